//! Encoding follows ranks, decoding undoes it, files survive and damaged files are refused.

use ghostvis_bpe::{Encoding, Pattern, Scratch, Trainer, Vocab, file};
use proptest::prelude::*;

fn encoding() -> Encoding {
    let pattern = Pattern::new("ghostvis").unwrap();
    let mut trainer = Trainer::new(pattern.clone(), 1);
    let words = "the cat that sat on a mat ababab aaaa aaaaaaaa abcabc bcbc cab\n\n\n    x = 12;\n中文中文 éé";
    trainer.feed(&[words, words, "abba baba cabbac"]).unwrap();
    let merges = trainer.finish(100, 1, |_| Ok(())).unwrap();
    let bytes: Vec<u8> = (0..=255).collect();
    let specials = vec![("<|bos|>".to_string(), 400), ("<|end|>".to_string(), 401)];
    let encoding = Encoding::new(Vocab::from_merges(&bytes, &merges).unwrap(), pattern, specials).unwrap();
    assert_eq!(encoding.merges().unwrap(), merges, "merges can be read back from the ranks");
    encoding
}

fn ids(encoding: &Encoding, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    encoding.encode_ordinary(text, &mut Scratch::default(), &mut ids).unwrap();
    ids
}

/// Merge the leftmost pair of lowest rank, looking everything up by bytes.
fn slow_merge(encoding: &Encoding, piece: &[u8]) -> Vec<u32> {
    let mut parts: Vec<Vec<u8>> = piece.iter().map(|&b| vec![b]).collect();
    loop {
        let rank = |i: usize| encoding.vocab().id(&[&parts[i][..], &parts[i + 1][..]].concat()).map(|rank| (rank, i));
        let Some((_, at)) = (0..parts.len().saturating_sub(1)).filter_map(rank).min() else { break };
        let right = parts.remove(at + 1);
        parts[at].extend(right);
    }
    parts.iter().map(|part| encoding.vocab().id(part).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn merging_follows_ranks_on_short_and_long_pieces(piece in prop_oneof!["[abc]{1,40}", "[abc]{60,200}", "a{60,90}"]) {
        let encoding = encoding();
        prop_assert_eq!(ids(&encoding, &piece), slow_merge(&encoding, piece.as_bytes()));
    }

    #[test]
    fn decoding_undoes_encoding_and_never_meets_a_special_token(text in prop_oneof![".{0,60}", "(<\\|bos\\|>|[ab ]){0,20}"]) {
        let encoding = encoding();
        let ids = ids(&encoding, &text);
        prop_assert_eq!(encoding.decode_bytes(&ids).unwrap(), text.as_bytes());
        prop_assert!(ids.iter().all(|&id| id < 400));
    }

    #[test]
    fn a_run_of_one_character_gives_the_ids_of_its_pieces(
        character in prop::sample::select(vec!["1", "2", "中", "é", "a", " ", "٣"]),
        times in 0..700usize,
        around in "[a1 中.]{0,3}",
    ) {
        let encoding = encoding();
        let text = format!("{around}{}{around}", character.repeat(times));
        let mut alone = Vec::new();
        let piece = |start: usize, end: usize| alone.extend(slow_merge(&encoding, &text.as_bytes()[start..end]));
        encoding.pattern().split(&text, piece).unwrap();
        prop_assert_eq!(ids(&encoding, &text), alone);
    }

    #[test]
    fn a_batch_is_each_text_alone(texts in prop::collection::vec("[ab c]{0,30}", 0..12), threads in 1usize..5) {
        let encoding = encoding();
        let alone: Vec<_> = texts.iter().map(|text| ids(&encoding, text)).collect();
        prop_assert_eq!(encoding.encode_batch(&texts, threads).unwrap(), alone);
    }

    #[test]
    fn a_damaged_file_is_refused_or_means_the_same(at in 0usize..3000, byte in any::<u8>()) {
        let encoding = encoding();
        let mut json = file::to_json(&encoding).unwrap().into_bytes();
        let at = at % json.len();
        json[at] = byte;
        if let Ok(other) = file::from_json(&json, "test") {
            prop_assert_eq!(other.hash(), encoding.hash());
        }
    }
}

#[test]
fn a_file_gives_the_same_encoding_back() {
    let encoding = encoding();
    let other = file::from_json(file::to_json(&encoding).unwrap().as_bytes(), "test").unwrap();
    assert_eq!(other.hash(), encoding.hash());
    assert_eq!(other.specials(), encoding.specials());
}

#[test]
fn merges_that_double_a_token_without_end_are_refused() {
    let bytes: Vec<u8> = (0..=255).collect();
    let merges: Vec<(u32, u32)> = std::iter::once((0, 0)).chain((256..400).map(|id| (id, id))).collect();
    let error = Vocab::from_merges(&bytes, &merges).unwrap_err();
    assert!(error.to_string().contains("merge 27, (282, 282): the tokens together exceed"), "{error}");
}

#[test]
fn a_megabyte_of_one_letter_trains_and_encodes() {
    let pattern = Pattern::new("ghostvis").unwrap();
    let text = "a".repeat(1 << 20);
    let mut trainer = Trainer::new(pattern.clone(), 1);
    trainer.feed(&[&text]).unwrap();
    let merges = trainer.finish(100, 1, |_| Ok(())).unwrap();
    let bytes: Vec<u8> = (0..=255).collect();
    let encoding = Encoding::new(Vocab::from_merges(&bytes, &merges).unwrap(), pattern, vec![]).unwrap();
    assert_eq!(encoding.merges().unwrap(), merges);
    assert_eq!(ids(&encoding, &text), [256 + 19]);
    assert_eq!(ids(&encoding, &text[1..]).len(), 20);
}
