//! The lowest floor: which adapter, memory under a budget, uploads of any size, and faults that come back typed, with
//! the kernel's and the tensor's name.

use demask_engine::Error;
use demask_engine::gpu::{Gpu, GpuOptions, Kernel};
use demask_engine::ops::add;
use demask_engine::tensor::{DType, Tensor};
use demask_tests::{checked_gpu, gpu, open};

fn filled(gpu: &Gpu, n: usize) -> Tensor {
    Tensor::zeros(gpu, [n], DType::F32, "filled")
}

#[test]
fn an_adapter_is_chosen_by_index_backend_and_name_and_never_replaced_silently() {
    let Some(gpu) = gpu() else { return };
    let info = gpu.adapter().info.clone();
    let named = |adapter: &str| {
        Gpu::open(GpuOptions { adapter: Some(adapter.into()), ..GpuOptions::default() })
    };
    let index = gpu.adapter().index.to_string();
    for adapter in [info.backend.to_str(), &info.name.to_uppercase(), &index] {
        assert_eq!(named(adapter).unwrap().adapter().info.name, info.name, "{adapter}");
    }
    let error = named("no such thing").err().expect("no silent fallback");
    assert!(matches!(error, Error::NoAdapter { .. }));
    assert!(error.to_string().contains(&info.name), "says what there is: {error}");
}

#[test]
fn a_budget_is_kept_and_the_error_names_who_asked() {
    let Some(gpu) = open(GpuOptions { budget: Some(1 << 20), ..GpuOptions::default() }) else {
        return;
    };
    let a = filled(&gpu, 100_000);
    let b = filled(&gpu, 100_000);
    let error = add(&a, &b).to_vec().unwrap_err();
    let Error::OutOfMemory { op, tensor, bytes, live, budget, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!((op.as_str(), tensor.as_str()), ("add", "[100000]"));
    assert!(*bytes >= 400_000 && *live >= 800_000 && *budget == 1 << 20, "{error}");
    // The fault is told once; with room again the device goes on.
    drop((a, b));
    let a = filled(&gpu, 1000);
    assert_eq!(add(&a, &a.clone()).to_vec().unwrap(), vec![0.0; 1000]);
}

#[test]
fn a_tensor_beyond_one_binding_is_refused_by_name() {
    let Some(gpu) = open(GpuOptions { max_binding: Some(4096), ..GpuOptions::default() }) else {
        return;
    };
    let error = filled(&gpu, 1025).to_vec().unwrap_err();
    let Error::TooLarge { op, tensor, bytes, limit } = error else { panic!("{error}") };
    assert_eq!((op.as_str(), tensor.as_str(), bytes, limit), ("filled", "[1025]", 4100, 4096));
}

/// Reads a binding that the call does not give.
const WRONG: Kernel = Kernel::new(
    "wrong",
    "struct Params { n: u32 }
     @group(0) @binding(0) var<uniform> p: Params;
     @group(0) @binding(2) var<storage, read_write> y: array<f32>;
     @compute @workgroup_size(1) fn main() { y[0] = f32(p.n); }",
);

#[test]
fn an_invalid_kernel_is_a_typed_error_that_names_it() {
    let Some(gpu) = open(GpuOptions { synchronous: true, ..GpuOptions::default() }) else { return };
    let y = filled(&gpu, 4);
    WRONG.run(&1u32, &[], &[&y], [1, 1, 1]);
    let error = y.to_vec().unwrap_err();
    let Error::Validation { op, .. } = &error else { panic!("{error}") };
    assert_eq!(op, "wrong");
}

#[test]
fn uploads_of_any_size_come_back() {
    let Some(gpu) = gpu() else { return };
    // Odd sizes, an empty one, and one of several upload chunks.
    for n in [0usize, 1, 3, 4097, 9_000_001] {
        let values: Vec<u32> = (0..n as u32).collect();
        assert_eq!(Tensor::from_u32(&gpu, &values, [n]).to_vec_u32().unwrap(), values, "{n}");
    }
    let halves: Vec<u8> = (0..6).collect();
    let odd = Tensor::from_bytes(&gpu, &halves, [3], DType::Bf16, "halves");
    assert_eq!(odd.to_bytes().unwrap(), halves);
}

/// A part of a weight's memory is read, written, copied and filled where it stands, and nothing beside it.
#[test]
fn parts_of_a_tensor_keep_to_themselves() {
    let Some(gpu) = checked_gpu() else { return };
    let values: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let whole = Tensor::from_f32(&gpu, &values, [4, 64]);
    let [one, two] = [1, 2].map(|row| whole.part(row, 1));
    assert_eq!(one.to_vec().unwrap(), values[64..128]);
    assert_eq!(add(&one, &two).to_vec().unwrap()[..2], [64.0 + 128.0, 65.0 + 129.0]);
    let other = filled(&gpu, 64);
    gpu.copy(two.buffer(), 0, other.buffer(), 0, 8);
    gpu.copy(other.buffer(), 0, one.buffer(), 4, 8);
    gpu.zero(two.buffer());
    whole.part(3, 1).overwrite(&[7.0f32; 64]);
    let mut want = values;
    want[65..67].copy_from_slice(&[128.0, 129.0]);
    want[128..192].fill(0.0);
    want[192..].fill(7.0);
    assert_eq!(whole.to_vec().unwrap(), want);
    // The memory lives as long as a part of it, and goes back to the pool once.
    drop((whole, one, other));
    let live = gpu.memory().live;
    assert_eq!(two.to_vec().unwrap(), vec![0.0; 64]);
    drop(two);
    assert!(gpu.memory().live < live);
    // Parts are the same memory: a dispatch must not write one and bind another.
    let whole = filled(&gpu, 128).reshape([2, 64]);
    let parts = [0, 1].map(|row| whole.part(row, 1));
    assert!(parts[0].buffer().same(parts[1].buffer()) && whole.buffer().same(parts[1].buffer()));
    assert!(!whole.buffer().same(filled(&gpu, 128).buffer()));
}

#[test]
fn dropped_buffers_are_used_again_and_counted() {
    let Some(gpu) = gpu() else { return };
    let before = gpu.memory();
    let first = filled(&gpu, 50_000);
    let reserved = gpu.memory().reserved;
    let live = gpu.memory().live;
    drop(first);
    assert_eq!(gpu.memory().live, before.live);
    let again = filled(&gpu, 50_000);
    assert_eq!((gpu.memory().live, gpu.memory().reserved), (live, reserved));
    assert_eq!(gpu.memory().peak, live);
    drop(again);
    gpu.trim();
    assert_eq!(gpu.memory().reserved, before.reserved);
}

/// Writes one number behind its buffer.
const STRAY: Kernel = Kernel::new(
    "stray",
    "struct Params { n: u32 }
     @group(0) @binding(0) var<uniform> p: Params;
     @group(0) @binding(1) var<storage, read_write> y: array<f32>;
     @compute @workgroup_size(1) fn main() { y[p.n] = 1.0; }",
);

#[test]
fn guards_catch_a_stray_write() {
    let Some(gpu) = checked_gpu() else { return };
    let y = filled(&gpu, 8);
    STRAY.run(&7u32, &[], &[&y], [1, 1, 1]);
    assert!(gpu.check_guards(y.buffer()).unwrap());
    STRAY.run(&8u32, &[], &[&y], [1, 1, 1]);
    assert!(!gpu.check_guards(y.buffer()).unwrap());
}

#[test]
fn timestamps_name_kernels_where_they_exist() {
    let Some(gpu) = open(GpuOptions { timestamps: true, ..GpuOptions::default() }) else { return };
    let a = filled(&gpu, 100_000);
    for _ in 0..300 {
        add(&a, &a.clone());
    }
    let stats = gpu.stats();
    assert_eq!(stats.dispatches, 300);
    if gpu.adapter().features.contains(wgpu::Features::TIMESTAMP_QUERY) {
        let add = stats.kernels.get("add").expect("the kernel's name");
        assert!(add.count == 300 && !add.time.is_zero());
    }
    println!("host time per dispatch: {:?}", stats.host_time / 300);
}

const COUNT: Kernel = Kernel::new(
    "count",
    "struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < p.n {
        y[id.x] += 1u;
    }
}",
);

#[test]
fn the_device_skips_work_whose_condition_does_not_hold() {
    let Some(gpu) = checked_gpu() else { return };
    if !gpu.can_skip() {
        println!("SKIPPED: {} cannot skip work", gpu.adapter().describe());
        return;
    }
    let flag = Tensor::from_u32(&gpu, &[0, 7], [2]);
    let y = Tensor::zeros(&gpu, [100], DType::U32, "count");
    // More than one batch holds.
    let count = |n: u32| (0..n).for_each(|_| COUNT.run(&100u32, &[], &[&y], [2, 1, 1]));
    let read = || y.to_vec_u32().expect("the device works");
    gpu.only_if(flag.buffer(), 0, || count(300));
    assert_eq!(read(), [0; 100]);
    gpu.only_if(flag.buffer(), 1, || count(300));
    count(1);
    gpu.only_if(flag.buffer(), 0, || count(1));
    assert_eq!(read(), [301; 100]);
    // The condition is asked when the device gets there, not when the work is recorded.
    let late = Tensor::zeros(&gpu, [100], DType::U32, "late");
    COUNT.run(&100u32, &[], &[&late], [2, 1, 1]);
    gpu.only_if(late.buffer(), 99, || count(2));
    assert_eq!(read(), [303; 100]);
}
