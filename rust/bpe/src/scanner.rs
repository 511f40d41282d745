//! The preset patterns by hand: where the piece that begins at a place ends, without backtracking.

use crate::classes::{self, LETTER, LOWER, NEWLINE, NUMBER, SPACE, UPPER};
use crate::runs::{letters, shared_prefix};
use crate::split::Pieces;
use crate::window::{WINDOW, masks};

/// The most pieces that are cut alone before a window is tried again.
const MOST_ALONE: usize = 15;

/// A text and the class bits of its characters. Positions are byte offsets at character borders.
#[derive(Clone, Copy)]
pub struct Scanner<'t> {
    bits: &'static [u8],
    text: &'t [u8],
}

impl<'t> Scanner<'t> {
    pub fn new(text: &'t str) -> Self {
        Self { bits: classes::bits(), text: text.as_bytes() }
    }

    /// `digits`: how many digits make a piece, where the pattern cuts numbers.
    #[inline(always)]
    pub fn all(self, digits: Option<usize>, next: impl Fn(&Self, usize) -> usize, mut pieces: impl Pieces) {
        let mut start = 0;
        while start < self.text.len() {
            if let Some(digits) = digits
                && let Some((len, count)) = self.same_numbers(start, digits)
            {
                pieces.same(start, len, count);
                start += len * count;
                continue;
            }
            let end = next(&self, start);
            pieces.piece(start, end);
            start = end;
        }
    }

    /// Window by window, and piece by piece where windows get nowhere: beyond ASCII and in long runs.
    #[inline(always)]
    pub fn all_gpt4<const DIGITS: usize, const END_FIRST: bool>(self, mut pieces: impl Pieces) {
        let (mut start, mut alone, mut failures) = (0, 0, 0);
        while start < self.text.len() {
            if alone == 0 {
                if let Some((len, count)) = self.same_numbers(start, DIGITS) {
                    pieces.same(start, len, count);
                    start += len * count;
                    continue;
                }
                let end = self.window::<DIGITS>(start, &mut pieces);
                if end - start < WINDOW / 2 {
                    failures = MOST_ALONE.min(failures * 2 + 1);
                    alone = failures;
                } else {
                    failures = 0;
                    // At the end of the text all but the last run is cut now.
                    alone = usize::from(start + WINDOW > self.text.len());
                }
                start = end;
            } else {
                let end = self.gpt4::<DIGITS, END_FIRST>(start);
                pieces.piece(start, end);
                start = end;
                alone -= 1;
            }
        }
    }

    /// Where one digit over and over begins at `start`, which is the start of a piece: the bytes of a piece of `digits`
    /// digits, and how many such pieces there are.
    #[inline(always)]
    fn same_numbers(&self, start: usize, digits: usize) -> Option<(usize, usize)> {
        let first = self.text[start];
        if first < 0x80 && !(first.is_ascii_digit() && self.text.get(start + WINDOW) == Some(&first)) {
            return None;
        }
        self.same_characters(start, digits)
    }

    #[inline(never)]
    fn same_characters(&self, start: usize, digits: usize) -> Option<(usize, usize)> {
        let (class, len) = self.class(start);
        if class & NUMBER == 0 {
            return None;
        }
        let rest = &self.text[start..];
        let count = (len + shared_prefix(rest, &rest[len..])) / (len * digits);
        if count > 1 { Some((len * digits, count)) } else { None }
    }

    /// Hands on the pieces from `start` on that lie in a window; returns where the last one ends.
    #[inline(always)]
    fn window<const DIGITS: usize>(&self, start: usize, pieces: &mut impl Pieces) -> usize {
        let mut padded = [0; WINDOW];
        let (block, len) = match self.text.get(start..start + WINDOW) {
            Some(block) => (block.try_into().expect("the range has 64 bytes"), WINDOW),
            None => {
                let rest = &self.text[start..];
                padded[..rest.len()].copy_from_slice(rest);
                (&padded, rest.len())
            }
        };
        let masks = masks(block);
        let len = len.min(masks.wide.trailing_zeros() as usize);
        if len == 0 {
            return start;
        }
        let mut cut = masks.gpt4::<DIGITS>(len);
        while cut.quotes != 0 {
            let quote = cut.quotes.trailing_zeros() as usize;
            let end = self.contraction(start + quote, true) - start;
            if end > quote && end < WINDOW {
                cut.starts |= cut.letters & 1 << end;
            }
            cut.quotes &= cut.quotes - 1;
        }
        let mut from = start;
        let mut rest = cut.starts & !1;
        while rest != 0 {
            let to = start + rest.trailing_zeros() as usize;
            pieces.piece(from, to);
            from = to;
            rest &= rest - 1;
        }
        from
    }

    /// Class bits and byte length of the character at `i`; `(0, 0)` at the end of the text.
    #[inline(always)]
    fn class(&self, i: usize) -> (u8, usize) {
        match self.text.get(i) {
            None => (0, 0),
            Some(&b) if b < 0x80 => (self.bits[b as usize], 1),
            Some(&b) => self.class_wide(b as usize, i),
        }
    }

    /// The text came from a `str`, so the continuation bytes are there.
    #[inline]
    fn class_wide(&self, lead: usize, i: usize) -> (u8, usize) {
        let low = |k: usize| (self.text[i + k] & 0x3f) as usize;
        let (point, len) = match lead {
            0..0xe0 => ((lead & 0x1f) << 6 | low(1), 2),
            0xe0..0xf0 => ((lead & 0x0f) << 12 | low(1) << 6 | low(2), 3),
            _ => ((lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3), 4),
        };
        (self.bits[point], len)
    }

    /// End of the run of characters from `i` that have a bit of `mask`.
    #[inline(always)]
    fn run(&self, mut i: usize, mask: u8) -> usize {
        loop {
            let (class, len) = self.class(i);
            if class & mask == 0 {
                return i;
            }
            i += len;
        }
    }

    /// End of the run of characters from `i` that have no bit of `mask`.
    #[inline(always)]
    fn run_without(&self, mut i: usize, mask: u8) -> usize {
        loop {
            let (class, len) = self.class(i);
            if len == 0 || class & mask != 0 {
                return i;
            }
            i += len;
        }
    }

    /// End of the run of letters from `i`.
    #[inline(always)]
    fn letters(&self, mut i: usize) -> usize {
        loop {
            let Some(block) = self.text[i..].first_chunk::<16>() else { return self.run(i, LETTER) };
            let run = (!letters(block)).trailing_zeros() as usize;
            i += run;
            if run < 16 {
                if block[run] < 0x80 {
                    return i;
                }
                // A letter beyond ASCII seldom stands alone.
                let from = i;
                while let Some(&lead) = self.text.get(i)
                    && lead >= 0x80
                {
                    let (class, len) = self.class_wide(lead as usize, i);
                    if class & LETTER == 0 {
                        return i;
                    }
                    i += len;
                }
                debug_assert!(i > from);
            }
        }
    }

    #[inline(always)]
    fn digits(&self, mut i: usize, most: usize) -> usize {
        for _ in 0..most {
            let (class, len) = self.class(i);
            if class & NUMBER == 0 {
                break;
            }
            i += len;
        }
        i
    }

    /// End of `'(?:[sdmt]|ll|ve|re)` at `i`, or `i`. Folding case, `s` is also U+017F, the long s.
    fn contraction(&self, i: usize, fold: bool) -> usize {
        let Some((b'\'', rest)) = self.text[i..].split_first() else { return i };
        let at = |k: usize| match rest.get(k) {
            Some(&b) if fold => b.to_ascii_lowercase(),
            Some(&b) => b,
            None => 0,
        };
        match (at(0), at(1)) {
            (b's' | b'd' | b'm' | b't', _) => i + 2,
            (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => i + 3,
            _ if fold && rest.starts_with("ſ".as_bytes()) => i + 3,
            _ => i,
        }
    }

    /// The blanks from `i` on: up to the last newline (`\s*[\r\n]`, where the pattern has it), else all at the end
    /// of the text, else all but the last one (`\s+(?!\S)`), else the only one. `end_first`: `\s++$` comes first.
    #[inline(always)]
    fn blanks(&self, start: usize, newlines: bool, end_first: bool) -> usize {
        let (mut i, mut last, mut after_newline) = (start, start, start);
        loop {
            let (class, len) = self.class(i);
            if class & SPACE == 0 {
                break;
            }
            last = i;
            i += len;
            if class & NEWLINE != 0 {
                after_newline = i;
            }
        }
        let at_end = i == self.text.len();
        if newlines && after_newline > start && !(end_first && at_end) {
            after_newline
        } else if at_end || last == start {
            i
        } else {
            last
        }
    }

    pub fn gpt2(&self, start: usize) -> usize {
        let contraction = self.contraction(start, false);
        if contraction > start {
            return contraction;
        }
        let body = if self.text[start] == b' ' { start + 1 } else { start };
        let (class, len) = self.class(body);
        if class & LETTER != 0 {
            self.letters(body + len)
        } else if class & NUMBER != 0 {
            self.run(body + len, NUMBER)
        } else if len > 0 && class & SPACE == 0 {
            self.run_without(body + len, SPACE | LETTER | NUMBER)
        } else {
            self.blanks(start, false, true)
        }
    }

    /// The GPT-4 shape: words with one leading sign, `DIGITS` digits, signs with their newlines, blanks.
    #[inline(always)]
    fn gpt4<const DIGITS: usize, const END_FIRST: bool>(&self, start: usize) -> usize {
        let (class, len) = self.class(start);
        if class & LETTER != 0 {
            return self.letters(start + len);
        }
        let next = start + len;
        if class & (NUMBER | NEWLINE) == 0 {
            let (after, after_len) = self.class(next);
            if after & LETTER != 0 {
                let contraction = self.contraction(start, true);
                return if contraction > start { contraction } else { self.letters(next + after_len) };
            }
        } else if class & NUMBER != 0 {
            return self.digits(start, DIGITS);
        }
        let signs = self.signs(start);
        if signs > start { self.run(signs, NEWLINE) } else { self.blanks(start, true, END_FIRST) }
    }

    /// End of ` ?[^\s\p{L}\p{N}]+` at `start`, or `start`.
    #[inline(always)]
    fn signs(&self, start: usize) -> usize {
        let body = if self.text[start] == b' ' { start + 1 } else { start };
        let end = self.run_without(body, SPACE | LETTER | NUMBER);
        if end > body { end } else { start }
    }

    pub fn o200k(&self, start: usize) -> usize {
        let (class, len) = self.class(start);
        let may_lead = class & (LETTER | NUMBER | NEWLINE) == 0;
        let lead = start + if may_lead { len } else { 0 };
        // Alternative by alternative, each with the leading sign before without it, as the regex tries them.
        for (word, from) in [(Self::lower_word as fn(&Self, usize) -> usize, lead), (Self::lower_word, start)]
            .into_iter()
            .chain([(Self::upper_word as fn(&Self, usize) -> usize, lead), (Self::upper_word, start)])
        {
            let end = word(self, from);
            if end > from {
                return self.contraction(end, true);
            }
        }
        if class & NUMBER != 0 {
            return self.digits(start, 3);
        }
        let mut signs = self.signs(start);
        if signs == start {
            return self.blanks(start, true, false);
        }
        while let Some(b'\r' | b'\n' | b'/') = self.text.get(signs) {
            signs += 1;
        }
        signs
    }

    /// End of `UPPER*LOWER+` at `i`, or `i`. Letters without case and marks are in both classes.
    fn lower_word(&self, i: usize) -> usize {
        let (mut end, mut after_both) = (i, i);
        loop {
            let (class, len) = self.class(end);
            if class & UPPER == 0 {
                break;
            }
            end += len;
            if class & LOWER != 0 {
                after_both = end;
            }
        }
        let lower = self.run(end, LOWER);
        if lower > end { lower } else { after_both }
    }

    /// End of `UPPER+LOWER*` at `i`, or `i`.
    fn upper_word(&self, i: usize) -> usize {
        let upper = self.run(i, UPPER);
        if upper > i { self.run(upper, LOWER) } else { i }
    }
}
