//! Unicode classes of the split patterns, one byte of bits per code point.
//!
//! The tables are those of `regex-syntax` (Unicode 16.0, see the test), so the hand-written scanner and a
//! pattern given to the regex engine agree on every character.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

pub const LETTER: u8 = 1; // \p{L}
pub const NUMBER: u8 = 2; // \p{N}
pub const SPACE: u8 = 4; // \s
pub const NEWLINE: u8 = 8; // [\r\n]
pub const UPPER: u8 = 16; // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
pub const LOWER: u8 = 32; // [\p{Ll}\p{Lm}\p{Lo}\p{M}]

const CODE_POINTS: usize = 0x11_0000;

/// 1.1 MB, of which real text touches a few cache lines.
static BITS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bits = vec![0u8; CODE_POINTS];
    for (class, bit) in [
        (r"\p{L}", LETTER),
        (r"\p{N}", NUMBER),
        (r"\s", SPACE),
        (r"[\r\n]", NEWLINE),
        (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", UPPER),
        (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", LOWER),
    ] {
        for (first, last) in ranges(class) {
            bits[first as usize..=last as usize].iter_mut().for_each(|b| *b |= bit);
        }
    }
    bits
});

fn ranges(class: &str) -> Vec<(u32, u32)> {
    let hir = regex_syntax::parse(class).expect("a literal character class parses");
    match hir.kind() {
        HirKind::Class(Class::Unicode(set)) => set.iter().map(|r| (r.start() as u32, r.end() as u32)).collect(),
        kind => unreachable!("{class} is a Unicode class, not {kind:?}"),
    }
}

/// The bits of all code points, indexed by code point.
pub fn bits() -> &'static [u8] {
    &BITS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_those_of_unicode_16() {
        let count = |bit| bits().iter().filter(|&&b| b & bit != 0).count();
        assert_eq!((count(LETTER), count(NUMBER), count(SPACE)), (141_028, 1_911, 25));
    }

    #[test]
    fn control_separators_are_not_blanks_but_next_line_is() {
        for c in 0x1c..=0x1f {
            assert_eq!(bits()[c] & SPACE, 0);
        }
        assert_ne!(bits()[0x85] & SPACE, 0);
    }
}
