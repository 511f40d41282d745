//! Training equals the definition: recount everything, merge the most frequent pair.

use std::collections::HashMap;

use ghostvis_bpe::{Error, Pattern, Trainer};
use proptest::prelude::*;

type Merges = Vec<(u32, u32)>;

fn trainer(threads: usize) -> Trainer {
    Trainer::new(Pattern::new("ghostvis").unwrap(), threads)
}

fn train(texts: &[String], threads: usize, merges: usize, min_frequency: i64) -> Merges {
    let mut trainer = trainer(threads);
    trainer.feed(texts).unwrap();
    trainer.finish(merges, min_frequency, |_| Ok(())).unwrap()
}

fn slow_train(texts: &[String], merges: usize, min_frequency: i64) -> Merges {
    let pattern = Pattern::new("ghostvis").unwrap();
    let mut words: Vec<Vec<u32>> = Vec::new();
    for text in texts {
        let bytes = text.as_bytes();
        pattern.split(text, |s, e| words.push(bytes[s..e].iter().map(|&b| u32::from(b)).collect())).unwrap();
    }
    let mut learned = Merges::new();
    while learned.len() < merges {
        let mut counts: HashMap<(u32, u32), i64> = HashMap::new();
        for word in &words {
            word.windows(2).for_each(|w| *counts.entry((w[0], w[1])).or_default() += 1);
        }
        let best = counts.into_iter().max_by_key(|&(pair, count)| (count, std::cmp::Reverse(pair)));
        let Some((pair, _)) = best.filter(|&(_, count)| count >= min_frequency) else { break };
        let new = 256 + learned.len() as u32;
        learned.push(pair);
        for word in &mut words {
            let mut i = 0;
            while i + 1 < word.len() {
                if (word[i], word[i + 1]) == pair {
                    word.splice(i..i + 2, [new]);
                }
                i += 1;
            }
        }
    }
    learned
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn training_equals_recounting(
        texts in prop::collection::vec(prop_oneof!["[ab ]{0,60}", "[abc]{0,80}", "[a-d '0-9é中\n]{0,60}"], 0..8),
        min_frequency in 1i64..4,
        threads in 1usize..4,
    ) {
        prop_assert_eq!(train(&texts, threads, 40, min_frequency), slow_train(&texts, 40, min_frequency));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// A few words that come often set a threshold that rare pairs stay below until all is counted again.
    #[test]
    fn training_equals_recounting_where_counts_differ_by_thousands(
        words in prop::collection::vec(("[abcd]{2,8}", prop::sample::select(vec![1usize, 2, 7, 60, 3000])), 1..7),
        min_frequency in prop::sample::select(vec![1i64, 2, 5]),
    ) {
        let texts: Vec<String> = words.iter().map(|(word, times)| format!(" {word}").repeat(*times)).collect();
        prop_assert_eq!(train(&texts, 1, 30, min_frequency), slow_train(&texts, 30, min_frequency));
    }
}

#[test]
fn feeding_in_any_cut_and_order_gives_the_same_merges() {
    let texts: Vec<String> =
        (0..200).map(|i| format!("word{} {} and the cat {}", i % 7, i * i, "ab".repeat(i % 5))).collect();
    let whole = train(&texts, 1, 100, 1);
    let mut trainer = trainer(3);
    texts.iter().rev().for_each(|text| trainer.feed(&[text]).unwrap());
    assert_eq!(trainer.finish(100, 1, |_| Ok(())).unwrap(), whole);
}

#[test]
fn a_megabyte_in_one_word_is_not_quadratic() {
    let mut state = 1u64;
    let mut letter = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (b'a' + (state >> 33) as u8 % 26) as char
    };
    let letters: String = (0..1_000_000).map(|_| letter()).collect();
    assert_eq!(train(&[letters], 1, 500, 1).len(), 500);
    assert_eq!(train(&["a".repeat(1 << 20)], 1, 100, 1).len(), 20);
}

#[test]
fn progress_can_stop_the_training() {
    let mut trainer = trainer(1);
    trainer.feed(&["abc abd"]).unwrap();
    assert!(matches!(trainer.finish(10, 1, |_| Err(Error::Stopped)), Err(Error::Stopped)));
}
