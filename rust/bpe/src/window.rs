//! Sixty-four bytes at a time: where the pieces of ASCII text begin, by arithmetic on one bit per byte.
//!
//! Cutting piece by piece costs a mispredicted branch or two for each; here it is one for a dozen pieces. What a window
//! cannot know (characters beyond ASCII, the run that its end cuts) is left to the scanner that goes piece by piece.

/// The bytes of a window.
pub const WINDOW: usize = 64;

/// One bit per byte of a window, the first byte's lowest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Masks {
    pub letter: u64,
    pub digit: u64,
    /// `\r` and `\n`.
    pub newline: u64,
    /// White space that is not a newline.
    pub blank: u64,
    /// `' '` alone.
    pub space: u64,
    pub quote: u64,
    /// Not ASCII.
    pub wide: u64,
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn masks(block: &[u8; WINDOW]) -> Masks {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi8, _mm_cmpeq_epi8, _mm_cmplt_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128,
        _mm_set1_epi8,
    };
    // A range is shifted to the smallest signed bytes, so that one comparison finds it.
    #[inline(always)]
    fn range(bytes: __m128i, first: u8, count: i8) -> __m128i {
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let shifted = _mm_add_epi8(bytes, _mm_set1_epi8(0x80u8.wrapping_sub(first) as i8));
            _mm_cmplt_epi8(shifted, _mm_set1_epi8(-128 + count))
        }
    }
    #[inline(always)]
    fn bits(found: __m128i, quarter: usize) -> u64 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { u64::from(_mm_movemask_epi8(found) as u32) << (16 * quarter) }
    }
    let mut all = Masks::default();
    for (quarter, part) in block.as_chunks::<16>().0.iter().enumerate() {
        // SAFETY: SSE2 is part of x86-64, and the part is 16 readable bytes; the load needs no alignment.
        unsafe {
            let bytes = _mm_loadu_si128(part.as_ptr().cast());
            let is = |byte: u8| _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte as i8));
            let space = is(b' ');
            let newline = _mm_or_si128(is(b'\n'), is(b'\r'));
            all.letter |= bits(range(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), b'a', 26), quarter);
            all.digit |= bits(range(bytes, b'0', 10), quarter);
            all.newline |= bits(newline, quarter);
            all.blank |= bits(_mm_or_si128(range(bytes, b'\t', 5), space), quarter);
            all.space |= bits(space, quarter);
            all.quote |= bits(is(b'\''), quarter);
            all.wide |= bits(bytes, quarter);
        }
    }
    all.blank &= !all.newline;
    all
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub fn masks(block: &[u8; WINDOW]) -> Masks {
    masks_by_byte(block)
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn masks_by_byte(block: &[u8; WINDOW]) -> Masks {
    let mut all = Masks::default();
    for (i, &byte) in block.iter().enumerate() {
        let bit = 1 << i;
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' => all.letter |= bit,
            b'0'..=b'9' => all.digit |= bit,
            b'\r' | b'\n' => all.newline |= bit,
            b'\t' | 0x0b | 0x0c | b' ' => all.blank |= bit,
            b'\'' => all.quote |= bit,
            0x80.. => all.wide |= bit,
            _ => {}
        }
        all.space |= u64::from(byte == b' ') << i;
    }
    all
}

/// What a window says about its text.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// Where pieces begin, up to the last place that the window is sure of. The first byte is always one.
    pub starts: u64,
    /// Apostrophes that lead a word. Where a contraction ends before its letters do, another piece begins.
    pub quotes: u64,
    /// The letters up to the last sure place.
    pub letters: u64,
}

impl Masks {
    /// The cuts of the GPT-4 shape, where a piece begins at the first byte and the text goes on for `len` bytes of
    /// ASCII (1 to 64): words with one leading sign, `DIGITS` digits, signs with their newlines, blanks.
    #[inline(always)]
    pub fn gpt4<const DIGITS: usize>(&self, len: usize) -> Cut {
        let valid = u64::MAX >> (WINDOW - len);
        let (letter, digit) = (self.letter & valid, self.digit & valid);
        let (newline, blank) = (self.newline & valid, self.blank & valid);
        let white = newline | blank;
        let sign = valid & !(letter | digit | white);
        let first = |run: u64| run & !(run << 1);
        let (letters, digits, signs, whites) = (first(letter), first(digit), first(sign), first(white));

        // `[^\r\n\p{L}\p{N}]?\p{L}+`: a blank is always free to lead (`\s+(?!\S)` leaves it), a sign is where it is
        // alone and ` ?[^\s\p{L}\p{N}]+` has not taken it.
        let leading = signs & !(sign >> 1) & !(self.space << 1);
        let words = letters & !((blank | leading) << 1);
        let numbers = if DIGITS == 1 { digit } else { groups::<DIGITS>(digit, digits) };
        // Newlines right after signs belong to them.
        let free_whites = whites & !(newline & (sign << 1));
        let after_newline = blank & (newline << 1);
        // `\s*[\r\n]` goes on to the last newline, so blanks between two newlines begin no piece. (A sum carries
        // through a run of ones to the bit behind it.)
        let between = blank.wrapping_add(after_newline) & !blank & newline;
        let last_blank = blank & !(white >> 1);
        let free_signs = signs & !(self.space << 1);
        let starts = words | numbers | free_signs | free_whites | after_newline | last_blank;

        // The end may cut the last run, whose first byte is sure all the same. So is that of the white space where
        // blanks lie between newlines.
        let runs = letters | digits | signs | whites;
        let runs = if between == 0 { runs } else { whites & (between & between.wrapping_neg()).wrapping_sub(1) };
        let sure = u64::MAX >> runs.leading_zeros();
        let quotes = self.quote & leading & (letter >> 1);
        Cut { starts: starts & sure, quotes: quotes & sure, letters: letter & sure }
    }
}

/// The first of every `SIZE` digits of each run.
#[inline(always)]
fn groups<const SIZE: usize>(digit: u64, first: u64) -> u64 {
    let whole = (0..=SIZE).fold(u64::MAX, |whole, i| whole & digit << i);
    let (mut groups, mut next) = (first, (first << SIZE) & whole);
    while next != 0 {
        groups |= next;
        next = (next << SIZE) & whole;
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_is_in_its_class(block in prop::array::uniform32(any::<u8>())) {
            let mut bytes = [0; WINDOW];
            bytes[..32].copy_from_slice(&block);
            bytes[32..].copy_from_slice(&block.map(|byte| byte & 0x7f));
            prop_assert_eq!(masks(&bytes), masks_by_byte(&bytes));
        }
    }

    #[test]
    fn all_bytes_are_in_the_classes_of_the_unicode_tables() {
        use crate::classes::{self, LETTER, NEWLINE, NUMBER, SPACE};
        for byte in 0..0x80u8 {
            let mut block = [b'-'; WINDOW];
            block[37] = byte;
            let (found, class) = (masks(&block), classes::bits()[byte as usize]);
            let bit = |mask: u64| mask >> 37 & 1 == 1;
            assert_eq!(bit(found.letter), class & LETTER != 0);
            assert_eq!(bit(found.digit), class & NUMBER != 0);
            assert_eq!(bit(found.newline), class & NEWLINE != 0);
            assert_eq!(bit(found.blank), class & SPACE != 0 && class & NEWLINE == 0);
        }
    }
}
