//! The choice of kernels: proven, raced, kept, and taken up again.

use std::time::Duration;

use demask_engine::gpu::GpuOptions;
use demask_engine::ops::{Layout, MatmulKernel, Product};
use demask_engine::tensor::DType;
use demask_engine::tune::{Tuning, Verdict, fault};
use demask_tests::{gpu, open};

const ENOUGH: Duration = Duration::from_secs(600);

fn products() -> Vec<Product> {
    let product = |layout, weight, m, n, k| Product { layout, weight, m, n, k };
    vec![
        product(Layout::NT, DType::F32, 4, 96, 64),
        product(Layout::NT, DType::Q4, 4, 96, 64),
        product(Layout::TN, DType::F32, 64, 96, 40),
    ]
}

#[test]
fn winners_are_kept_on_disk_and_taken_up_again() {
    let Some(gpu) = gpu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut first = Tuning::open(&gpu, dir.path());
    let mut seen = Vec::new();
    first.prepare(&products(), ENOUGH, |done, all, _| seen.push((done, all))).unwrap();
    assert_eq!(seen, [(0, 3), (1, 3), (2, 3), (3, 3)]);
    assert_eq!(first.decisions().len(), 3);
    for (class, decision) in first.decisions() {
        let won = &decision.candidates[&decision.chosen];
        assert!(matches!(won, Verdict::Milliseconds(ms) if *ms > 0.0), "{class}: {decision:?}");
        assert_eq!(decision.refused().count(), 0, "{class}: {decision:?}");
    }
    let mut again = Tuning::open(&gpu, dir.path());
    assert_eq!(again.decisions(), first.decisions());
    again.prepare(&products(), ENOUGH, |_, _, _| panic!("nothing is left to race")).unwrap();
}

/// Where products may round their factors, other kernels may race: one choice says nothing about the other.
#[test]
fn exact_and_rounded_products_are_decided_apart() {
    let (Some(exact), Some(rounded)) =
        (gpu(), open(GpuOptions { f16_products: true, ..GpuOptions::default() }))
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = |gpu| Tuning::open(gpu, dir.path()).path().to_owned();
    assert_ne!(path(&exact), path(&rounded));
}

#[test]
fn without_a_budget_the_default_stays_for_good() {
    let Some(gpu) = gpu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut tuning = Tuning::open(&gpu, dir.path());
    tuning.prepare(&products(), Duration::ZERO, |_, _, _| {}).unwrap();
    let before = tuning.decisions().clone();
    assert!(before.values().all(|d| d.candidates.is_empty() && d.chosen == d.default));
    let mut again = Tuning::open(&gpu, dir.path());
    again.prepare(&products(), ENOUGH, |_, _, _| {}).unwrap();
    assert_eq!(*again.decisions(), before);
    again.forget(&products()).unwrap();
    assert!(!again.path().exists());
}

#[test]
fn a_damaged_file_is_told_and_replaced() {
    let Some(gpu) = gpu() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = Tuning::open(&gpu, dir.path()).path().to_owned();
    for text in ["", "{", "[1]", "{\"schema\":9,\"device\":\"x\",\"decisions\":{}}"] {
        std::fs::write(&path, text).unwrap();
        let mut tuning = Tuning::open(&gpu, dir.path());
        let notice = tuning.notice.clone().unwrap();
        assert!(notice.contains(&path.display().to_string()), "{notice}");
        tuning.prepare(&products()[..1], Duration::ZERO, |_, _, _| {}).unwrap();
        assert!(Tuning::open(&gpu, dir.path()).notice.is_none(), "after {text:?}");
    }
    // A kernel that this version does not have is no decision.
    let unknown = std::fs::read_to_string(&path).unwrap().replace("\"matmul", "\"matmul_of_old");
    std::fs::write(&path, unknown).unwrap();
    let mut tuning = Tuning::open(&gpu, dir.path());
    tuning.prepare(&products()[..1], Duration::ZERO, |_, _, _| {}).unwrap();
    let decision = tuning.decisions().values().next().unwrap();
    assert!(MatmulKernel::named(&decision.chosen).is_some(), "{decision:?}");
}

#[test]
fn a_kernel_that_computes_wrong_is_found_out() {
    let Some(gpu) = gpu() else { return };
    // This kernel only knows weights stored by output rows; here they are stored by input rows.
    let product = Product { layout: Layout::NN, weight: DType::F32, m: 4, n: 64, k: 64 };
    let why = fault(&gpu, product, MatmulKernel::Few).unwrap().expect("wrong numbers");
    assert!(why.contains("instead of"), "{why}");
    assert_eq!(fault(&gpu, product, MatmulKernel::Tile).unwrap(), None);
}
