//! Documents are made of one number each, so that a sequence tells whose tokens it holds.

use super::*;
use crate::data::filter::Report;
use crate::data::shards::{Manifest, SourceManifest, VERSION, Writer};

const EOS_ID: u32 = 0;

/// Name, whether documents stay whole, weight, documents.
type Source<'a> = (&'a str, bool, Option<f64>, &'a [Vec<u32>]);

/// A dataset of these sources.
fn dataset(sources: &[Source<'_>]) -> (tempfile::TempDir, Dataset) {
    let folder = tempfile::tempdir().unwrap();
    let sources = sources.iter().map(|&(name, whole, weight, documents)| {
        let train = documents.chunks(40).enumerate().filter_map(|(i, documents)| {
            let mut writer = Writer::new(folder.path(), format!("train/{name}-{i}")).unwrap();
            documents.iter().for_each(|d| writer.push(d).unwrap());
            writer.finish().unwrap()
        });
        SourceManifest {
            name: name.into(),
            whole,
            format: Default::default(),
            weight,
            train: train.collect(),
            held_out: vec![],
            report: Report::default(),
        }
    });
    let sources = sources.collect();
    let manifest = Manifest {
        version: VERSION,
        fingerprint: 0,
        vocab_size: 1000,
        eos: EOS_ID,
        end_of_turn: None,
        sources,
    };
    let dataset = Dataset { folder: folder.path().to_owned(), manifest };
    (folder, dataset)
}

/// Documents of 1, 2, … n tokens; document i consists of the token i + 10.
fn documents(n: u32) -> Vec<Vec<u32>> {
    (0..n).map(|i| vec![i + 10; i as usize + 1]).collect()
}

fn packing(length: usize, visibility: Visibility) -> Packing {
    Packing { length, eos: EOS_ID, visibility, seed: 3 }
}

fn packed(n: u32, length: usize, visibility: Visibility) -> Packed {
    let (_folder, dataset) = dataset(&[("text", false, None, &documents(n))]);
    Packed::new(&dataset, Part::Train, &BTreeMap::new(), packing(length, visibility)).unwrap()
}

fn all_tokens(packed: &Packed) -> Vec<u32> {
    (0..packed.n_sequences()).flat_map(|place| packed.in_order(place).tokens).collect()
}

#[test]
fn one_to_four_ends_follow_each_document() {
    let packed = packed(400, 7, Visibility::Mutual);
    let tokens = all_tokens(&packed);
    let mut seen = [0; 5];
    for run in tokens.chunk_by(|a, b| (*a == EOS_ID) == (*b == EOS_ID)) {
        if run[0] == EOS_ID && run.as_ptr_range().end != tokens.as_ptr_range().end {
            seen[run.len()] += 1;
        }
    }
    assert_eq!(seen[0], 0);
    assert!(seen[1..].iter().all(|&n| (70..130).contains(&n)), "{seen:?}");
    assert_eq!(packed.in_order(0).spans, [[0, 7]; 7]);
    assert!((0..packed.n_sequences()).all(|p| packed.in_order(p).learnt == [true; 7]));
    let text: Vec<u32> = tokens.into_iter().filter(|&t| t != EOS_ID).collect();
    assert!(documents(400).concat().starts_with(&text), "documents follow in their order");
}

#[test]
fn confined_documents_start_on_a_block_and_see_only_themselves() {
    let packed = packed(50, 16, Visibility::Confined { alignment: 4 });
    let mut documents_seen = 0;
    for place in 0..packed.n_sequences() {
        let Sequence { tokens, spans, .. } = packed.in_order(place);
        for (i, &[start, end]) in spans.iter().enumerate() {
            assert!((start..end).contains(&(i as u32)) && start % 4 == 0 && end % 4 == 0);
            let document = &tokens[start as usize..end as usize];
            let text: Vec<u32> = document.iter().copied().filter(|&t| t != EOS_ID).collect();
            assert!(text.iter().all(|t| *t == text[0]), "two documents in one span");
            documents_seen += u32::from(i as u32 == start && !text.is_empty());
        }
    }
    assert!(documents_seen >= 49);
    let first = packed.in_order(0);
    assert_eq!(first.tokens[0], 10, "the first document is one token and its ends");
    assert!(first.tokens[1..first.spans[0][1] as usize].iter().all(|&t| t == EOS_ID));
}

/// A prompt of the token 500 + i, given, and an answer of i + 10.
fn conversations(n: u32) -> Vec<Vec<u32>> {
    (0..n)
        .map(|i| [vec![(500 + i) | GIVEN; 1 + i as usize % 5], vec![i + 10; 1 + i as usize % 7]])
        .map(|parts| parts.concat())
        .collect()
}

#[test]
fn conversations_stay_whole_and_their_prompts_are_not_learnt() {
    let mut all = conversations(90);
    all.push(vec![7; 40]);
    let (_folder, dataset) = dataset(&[("chat", true, None, &all)]);
    for (visibility, alignment) in
        [(Visibility::Mutual, 1), (Visibility::Confined { alignment: 4 }, 4)]
    {
        let packing = packing(32, visibility);
        let packed = Packed::new(&dataset, Part::Train, &BTreeMap::new(), packing).unwrap();
        assert_eq!(
            packed.sources().next(),
            Some(("chat", packed.n_sequences(), 1)),
            "one is too long"
        );
        let mut seen = std::collections::BTreeSet::new();
        let mut filled = 0;
        for place in 0..packed.n_sequences() {
            let Sequence { tokens, learnt, spans } = packed.in_order(place);
            assert!(tokens.len() == 32 && learnt.len() == 32 && spans.len() == 32);
            filled += learnt.iter().zip(&tokens).filter(|&(l, t)| !l && *t == EOS_ID).count();
            assert!(tokens.iter().zip(&learnt).all(|(&t, &l)| t == EOS_ID || l == (t < 500)));
            for i in (0..32).filter(|&i| tokens[i] >= 500 && (i == 0 || tokens[i - 1] < 500)) {
                let number = tokens[i] - 500;
                seen.insert(number);
                assert_eq!(i % alignment, 0);
                let whole: Vec<u32> =
                    conversations(90)[number as usize].iter().map(|t| t & !GIVEN).collect();
                assert_eq!(tokens[i..i + whole.len()], whole, "conversation {number} is cut");
                assert_eq!(tokens.get(i + whole.len()), Some(&EOS_ID));
                assert!(learnt[i + whole.len()], "its end is learnt");
                if alignment > 1 {
                    assert_eq!(spans[i][0] as usize, i);
                }
            }
        }
        assert_eq!(seen.len(), 90);
        assert!(filled * 10 < 32 * packed.n_sequences() as usize, "{filled} places are wasted");
    }
}

#[test]
fn an_epoch_visits_every_sequence_once_in_its_own_order() {
    let packed = packed(60, 5, Visibility::Mutual);
    let n = packed.n_sequences();
    let places =
        |epoch| (0..n).map(move |i| shuffled(i, n, 3 ^ SHUFFLE, epoch)).collect::<Vec<_>>();
    let mut sorted = places(0);
    sorted.sort_unstable();
    assert_eq!(sorted, (0..n).collect::<Vec<_>>());
    assert_ne!(places(0), places(1));
    assert_eq!(packed.sequence(n + 4), packed.in_order(places(1)[4]));
}

/// Each place comes first in about a tenth of the epochs: χ² with 9 degrees of freedom exceeds
/// 27.9 for one seed in a thousand.
#[test]
fn the_order_is_uniform_even_for_few_sequences() {
    let mut first = [0_u32; 10];
    (0..10_000).for_each(|epoch| first[shuffled(0, 10, 5 ^ SHUFFLE, epoch) as usize] += 1);
    let chi2: f64 = first.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
    assert!(chi2 < 27.9, "{first:?}");
    assert_eq!(shuffled(0, 1, 5, 0), 0);
}

#[test]
fn weights_are_shares_of_the_sequences_and_each_source_has_its_epochs() {
    let (common, scarce) = (vec![vec![1; 6000]], vec![vec![2; 200]]);
    let sources: [Source<'_>; 2] =
        [("common", false, Some(3.0), &common), ("scarce", false, Some(1.0), &scarce)];
    let (_folder, dataset) = dataset(&sources);
    let packed = |weights: &[(&str, f64)]| {
        let weights = weights.iter().map(|&(name, w)| (name.to_owned(), w)).collect();
        Packed::new(&dataset, Part::Train, &weights, packing(10, Visibility::Mutual))
    };
    let share = |packed: &Packed| {
        let scarce = (0..4000).filter(|&i| packed.sequence(i).tokens.contains(&2)).count();
        scarce as f64 / 4000.0
    };
    let as_made = packed(&[]).unwrap();
    assert!((share(&as_made) - 0.25).abs() < 0.03, "{}", share(&as_made));
    let other = packed(&[("common", 1.0), ("scarce", 1.0)]).unwrap();
    assert!((share(&other) - 0.5).abs() < 0.03);
    // In any 20 visits of the scarce source, every one of its 20 sequences comes once.
    let n = as_made.sources().nth(1).unwrap().1;
    assert_eq!(n, 20);
    let error = packed(&[("rare", 1.0)]).err().unwrap().to_string();
    assert!(error.contains("\"rare\"") && error.contains("scarce"), "{error}");
}

#[test]
fn too_few_tokens_are_an_error_with_a_remedy() {
    let (_folder, dataset) = dataset(&[("text", false, None, &documents(3))]);
    let packing = packing(64, Visibility::Mutual);
    let error = Packed::new(&dataset, Part::Train, &BTreeMap::new(), packing).err().unwrap();
    assert!(error.to_string().contains("shorten the sequences"), "{error}");
}
