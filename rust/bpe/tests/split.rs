//! The hand-written scanner cuts exactly as its regular expression does.

use std::sync::LazyLock;

use ghostvis_bpe::{PRESETS, Pattern};
use proptest::prelude::*;

fn pieces(pattern: &Pattern, text: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let each = |start: usize, end: usize| pieces.push(text[start..end].to_string()); // panics inside a character
    pattern.split(text, each).expect("short texts split");
    pieces
}

/// Each preset, and its regex in a group: that is no longer the preset, so it goes through the regex engine.
static BOTH: LazyLock<Vec<(Pattern, Pattern)>> = LazyLock::new(|| {
    let compile = |regex: &str| Pattern::new(regex).expect("presets compile");
    PRESETS.iter().map(|(name, regex)| (compile(name), compile(&format!("(?:{regex})")))).collect()
});

/// A few members of every class that a pattern tells apart.
fn class_alphabet() -> impl Strategy<Value = String> {
    let members = [
        " ",
        " ",
        "\t",
        "\r",
        "\n",
        "\u{a0}",
        "\u{3000}",
        "\u{85}",
        "\u{1c}",
        "'",
        "'",
        "s",
        "S",
        "ſ",
        "ll",
        "LL",
        "ve",
        "Re",
        "rE",
        "m",
        "d",
        "T",
        "a",
        "Z",
        "é",
        "É",
        "ǅ",
        "ʰ",
        "中",
        "क",
        "ि",
        "\u{301}",
        "1",
        "2",
        "٣",
        "Ⅷ",
        "½",
        "!",
        "/",
        "-",
        "_",
        "€",
        "😀",
        "\u{200d}",
        "\u{0}",
        "\u{10ffff}",
    ];
    prop::collection::vec(prop::sample::select(members.to_vec()), 0..40).prop_map(|parts| parts.concat())
}

/// ASCII alone and a little beyond, long enough for borders of windows at every place: words, runs, contractions.
fn windows_of_ascii() -> impl Strategy<Value = String> {
    let letters =
        prop::sample::select(vec!["a", "Z", "s", "word", "'s", "'ll", "'Ve", "'tis", "'lx", "x".repeat(70).leak()]);
    let others = prop::sample::select(vec![
        " ", " ", "  ", "\t", "\n", "\r\n", "\n  \n", "\x0b", "\x1c", "'", "''", "1", "23", "4567", ".", "(", " .",
        "!!", "/", "é", "\u{a0}",
    ]);
    prop::collection::vec(prop_oneof![letters, others], 0..120).prop_map(|parts| parts.concat())
}

/// One character over and over, of one to four bytes, between others.
fn runs() -> impl Strategy<Value = String> {
    let character = prop::sample::select(vec!["7", "0", "٣", "½", "𝟗", "我", "e", " ", "\n", "!", "😀"]);
    let run = (character, 0..260usize).prop_map(|(character, times)| character.repeat(times));
    prop::collection::vec(prop_oneof![run, "[0-9a .]{0,4}"], 0..6).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_preset_splits_as_its_regex(text in prop_oneof![class_alphabet(), windows_of_ascii(), runs(), "[ -~\n]{0,300}", ".{0,40}"]) {
        for (preset, slow) in &*BOTH {
            prop_assert_eq!(pieces(preset, &text), pieces(slow, &text), "{} on {:?}", preset.regex(), text);
        }
    }

    #[test]
    fn pieces_join_to_the_text_even_where_a_regex_leaves_gaps(text in class_alphabet()) {
        for regex in [r"\p{L}+", r"\d", "x*", "(?=a)"] {
            prop_assert_eq!(pieces(&Pattern::new(regex).unwrap(), &text).concat(), text.clone());
        }
    }
}

#[test]
fn every_code_point_splits_as_the_regex_says() {
    let all: Vec<char> = ('\0'..=char::MAX).collect();
    for chunk in all.chunks(4096) {
        let text: String = chunk.iter().flat_map(|&c| ['a', c, '1', ' ', c]).collect();
        for (preset, slow) in &*BOTH {
            assert_eq!(pieces(preset, &text), pieces(slow, &text), "{} from U+{:04X}", preset.regex(), chunk[0] as u32);
        }
    }
}

#[test]
fn blanks_before_a_word_leave_it_the_last_character_not_the_last_byte() {
    let pattern = Pattern::new("ghostvis").unwrap();
    assert_eq!(pieces(&pattern, "a\u{3000}\u{3000}\u{3000}b"), ["a", "\u{3000}\u{3000}", "\u{3000}b"]);
    assert_eq!(pieces(&pattern, "a\n  "), ["a", "\n", "  "]);
    assert_eq!(pieces(&Pattern::new("cl100k").unwrap(), "a\n  "), ["a", "\n  "]);
}

#[test]
fn the_long_s_is_a_contraction_except_in_gpt2() {
    assert_eq!(pieces(&Pattern::new("ghostvis").unwrap(), "it'ſx"), ["it", "'ſ", "x"]);
    assert_eq!(pieces(&Pattern::new("gpt2").unwrap(), "it'ſx"), ["it", "'", "ſx"]);
}

#[test]
fn ten_million_blanks_before_a_word_are_two_pieces() {
    let text = " ".repeat(10_000_000) + "x";
    for (name, _) in PRESETS {
        assert_eq!(pieces(&Pattern::new(name).unwrap(), &text).len(), 2);
    }
}

#[test]
fn a_custom_regex_that_gives_up_is_an_error() {
    let text = " ".repeat(2_000_000) + "x";
    let error = Pattern::new(r"(?:\s+(?!\S))|x").unwrap().split(&text, |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("gave up after byte 0"), "{error}");
}
