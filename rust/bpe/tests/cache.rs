//! What was met before changes no id, and its memory has a limit.

use ghostvis_bpe::{Encoding, Pattern, Scratch, Trainer, Vocab};
use proptest::prelude::*;

fn encoding(text: &str, merges: usize) -> Encoding {
    let pattern = Pattern::new("ghostvis").unwrap();
    let mut trainer = Trainer::new(pattern.clone(), 1);
    trainer.feed(&[text]).unwrap();
    let merges = trainer.finish(merges, 1, |_| Ok(())).unwrap();
    let bytes: Vec<u8> = (0..=255).collect();
    Encoding::new(Vocab::from_merges(&bytes, &merges).unwrap(), pattern, vec![]).unwrap()
}

fn ids(encoding: &Encoding, text: &str, scratch: &mut Scratch) -> Vec<u32> {
    let mut ids = Vec::new();
    encoding.encode_ordinary(text, scratch, &mut ids).unwrap();
    ids
}

/// Short and long words, more distinct ones than any cache line, slot or arena of the cache has room for.
fn words(from: u64, to: u64) -> String {
    let word = |i: u64| {
        let mixed = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let letters: String = (0..13).map(|k| (b'a' + (mixed >> (5 * k) & 15) as u8) as char).collect();
        match i % 8 {
            0 => format!(" {letters}").repeat(1 + (i % 3) as usize * 2).replace(' ', "") + " ",
            1..4 => format!(" {}", &letters[..6]),
            _ => format!(" {}", &letters[..9]),
        }
    };
    (from..to).map(word).collect()
}

#[test]
fn a_full_cache_changes_no_id_and_stays_below_32_megabytes() {
    let encoding = encoding(&words(0, 2000), 400);
    let mut scratch = Scratch::default();
    let parts: Vec<String> = (0..8).map(|part| words(part * 120_000, (part + 1) * 120_000)).collect();
    let sum = |ids: &[u32]| ids.iter().fold(0u64, |sum, &id| sum.wrapping_mul(31).wrapping_add(u64::from(id)));
    let first: Vec<u64> = parts.iter().map(|part| sum(&ids(&encoding, part, &mut scratch))).collect();
    for _ in 0..2 {
        let again: Vec<u64> = parts.iter().map(|part| sum(&ids(&encoding, part, &mut scratch))).collect();
        assert_eq!(first, again);
    }
    assert!(scratch.cache_bytes() <= 32 << 20, "{} bytes", scratch.cache_bytes());
    let (used, new) = (ids(&encoding, &parts[3], &mut scratch), ids(&encoding, &parts[3], &mut Scratch::default()));
    assert_eq!(used, new);
    assert_eq!(encoding.decode_bytes(&used).unwrap(), parts[3].as_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn texts_before_change_no_id(texts in prop::collection::vec("([ab]{1,20} ?){0,20}|a{60,400}|[ ]{60,400}", 1..8)) {
        let (one, other) = (encoding("ab abab aaaa baba    b", 12), encoding("aab aabaab bb b        ", 12));
        let mut scratch = Scratch::default();
        for text in texts.iter().chain(&texts) {
            for encoding in [&one, &other] {
                prop_assert_eq!(ids(encoding, text, &mut scratch), ids(encoding, text, &mut Scratch::default()));
            }
        }
    }
}
