//! The ids of a long piece from left to right, in time in proportion to its length.
//!
//! A sequence of tokens is what merging makes exactly when every two neighbours are what merging makes of their own
//! bytes. So the longest token that fits is taken, a shorter one where it does not go with the one before, and a step
//! back where none does; a border that failed is not tried again. (The idea is that of the `bpe` crate of rust-gems;
//! see also Berglund and van der Merwe 2023, "Formalizing BPE tokenization".)

use std::ops::RangeInclusive;

use crate::encode::Scratch;
use crate::lanes::{self, Work};
use crate::repeat;
use crate::runs::shared_prefix;
use crate::vocab::{NONE, Vocab};

#[derive(Debug, Clone, Copy)]
struct Node {
    /// The children are `first..first + children`.
    first: u32,
    children: u32,
    token: u32,
}

/// The tokens as a tree of prefixes, and what each is made of.
#[derive(Debug)]
pub struct Prefixes {
    nodes: Vec<Node>,
    /// The byte that leads into each node; ascending among siblings.
    labels: Vec<u8>,
    /// The longest token that begins a token and is shorter.
    shorter: Vec<u32>,
    /// The two tokens that were merged last; a single byte is itself twice.
    halves: Vec<(u32, u32)>,
    lengths: Vec<u32>,
}

/// An answer of `Prefixes::fitting`.
#[derive(Debug, Clone, Copy)]
struct Known {
    before: u32,
    token: u32,
    fits: u32,
}

/// 1,024 answers are remembered. A vocabulary with many tokens of one byte repeated tries seventy for each border of
/// such a text, and the same ones each time.
const KNOWN_SHIFT: u32 = u64::BITS - 10;

/// What `Prefixes::encode` writes on, lent to it for the memory and for the answers, which are those of one vocabulary.
#[derive(Debug, Default)]
pub struct Steps {
    /// One bit per border.
    failed: Vec<u64>,
    known: Vec<Known>,
}

impl Prefixes {
    /// `None` where a token is not made of two earlier ones: then neighbours do not tell what merging does.
    pub fn new(vocab: &Vocab) -> Option<Self> {
        let halves = halves(vocab)?;
        let mut sorted: Vec<(&[u8], u32)> =
            (0..vocab.id_bound()).filter_map(|id| vocab.bytes(id).map(|b| (b, id))).collect();
        sorted.sort_unstable();
        let bound = vocab.id_bound() as usize;
        let mut tree = Self {
            nodes: vec![Node { first: 0, children: 0, token: NONE }],
            labels: vec![0],
            shorter: vec![NONE; bound],
            halves,
            lengths: (0..vocab.id_bound()).map(|id| vocab.bytes(id).map_or(0, |b| b.len() as u32)).collect(),
        };
        // Breadth first, so that siblings are neighbours: (node, its tokens, depth, longest token so far).
        let mut queue = std::collections::VecDeque::from([(0usize, 0..sorted.len(), 0usize, NONE)]);
        while let Some((node, range, depth, longest)) = queue.pop_front() {
            tree.nodes[node].first = tree.nodes.len() as u32;
            let mut at = range.start;
            while at < range.end {
                let label = sorted[at].0[depth];
                let end = at + sorted[at..range.end].partition_point(|(bytes, _)| bytes[depth] == label);
                let child = tree.nodes.len();
                let (mut token, mut inner, mut longest) = (NONE, at, longest);
                if sorted[at].0.len() == depth + 1 {
                    token = sorted[at].1;
                    tree.shorter[token as usize] = longest;
                    longest = token;
                    inner += 1;
                }
                tree.nodes.push(Node { first: 0, children: 0, token });
                tree.labels.push(label);
                tree.nodes[node].children += 1;
                if inner < end {
                    queue.push_back((child, inner..end, depth + 1, longest));
                }
                at = end;
            }
        }
        Some(tree)
    }

    /// The longest token that `text` begins with; there is one, as every byte is a token.
    fn longest(&self, text: &[u8]) -> u32 {
        let (mut node, mut found) = (self.nodes[0], NONE);
        for &byte in text {
            let first = node.first as usize;
            let labels = &self.labels[first..first + node.children as usize];
            let child = match labels.len() {
                256 => byte as usize,
                0..=12 => match labels.iter().position(|&label| label == byte) {
                    Some(at) => at,
                    None => break,
                },
                _ => match labels.binary_search(&byte) {
                    Ok(at) => at,
                    Err(_) => break,
                },
            };
            node = self.nodes[first + child];
            if node.token != NONE {
                found = node.token;
            }
        }
        found
    }

    /// Whether merging the bytes of both tokens gives these two tokens again: nothing across the border may merge
    /// before what both are made of. Takes both apart from the last merge on, the later one first.
    fn go_together(&self, vocab: &Vocab, mut left: u32, mut right: u32) -> bool {
        let mut limit = NONE; // a merge across the border counts only if it comes before this
        loop {
            let joined = vocab.pair(left, right);
            if joined < limit {
                return false;
            }
            // Of equal tokens the left one was merged first, so the right one comes apart first.
            if left > right {
                let inner = self.halves[left as usize].1;
                if inner == left {
                    return true;
                }
                (limit, left) = (left, inner);
            } else {
                let inner = self.halves[right as usize].0;
                if inner == right {
                    // `right` is a single byte and `left`, which is no later, may yet come apart.
                    let inner = self.halves[left as usize].1;
                    if inner == left {
                        return true;
                    }
                    (limit, left) = (left, inner);
                } else {
                    (limit, right) = (right + 1, inner);
                }
            }
        }
    }

    /// The longest of `token` and the tokens it begins with that goes together with `before`, or `NONE`.
    #[inline]
    fn fitting(&self, vocab: &Vocab, before: u32, token: u32, known: &mut [Known]) -> u32 {
        if before == NONE {
            return token;
        }
        let place = (u64::from(before) << 32 | u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> KNOWN_SHIFT;
        let entry = &mut known[place as usize];
        if (entry.before, entry.token) != (before, token) {
            let mut fits = token;
            while fits != NONE && !self.go_together(vocab, before, fits) {
                fits = self.shorter[fits as usize];
            }
            *entry = Known { before, token, fits };
        }
        entry.fits
    }

    /// Appends the ids of `piece`.
    pub fn encode(&self, vocab: &Vocab, piece: &[u8], steps: &mut Steps, out: &mut Vec<u32>) {
        let period = period(piece);
        if period == 0 || !self.encode_from(vocab, piece, period, steps, out) {
            self.encode_from(vocab, piece, 0, steps, out);
        }
    }

    /// `encode`. Where the piece is `period` bytes over and over, a sequence of tokens that came back to the same token
    /// at the same place goes on repeating: it is copied up to where the end of the piece may be seen. All neighbours
    /// in it go together, so if the rest fits to it, it is right; if not, false, and nothing is appended.
    fn encode_from(&self, vocab: &Vocab, piece: &[u8], period: usize, steps: &mut Steps, out: &mut Vec<u32>) -> bool {
        let Steps { failed, known } = steps;
        failed.clear();
        failed.resize(piece.len() / 64 + 1, 0);
        known.resize(1 << (u64::BITS - KNOWN_SHIFT), Known { before: NONE, token: NONE, fits: NONE });
        let base = out.len();
        let mut cycle = Cycle { period, at: 0, end: base, patience: 1 };
        let mut copied = base;
        let mut at = 0;
        let mut token = self.longest(piece);
        loop {
            let before = if out.len() > base { out[out.len() - 1] } else { NONE };
            token = self.fitting(vocab, before, token, known);
            if token != NONE {
                let end = at + self.lengths[token as usize] as usize;
                if failed[end / 64] >> (end % 64) & 1 == 1 {
                    token = self.shorter[token as usize];
                } else {
                    out.push(token);
                    at = end;
                    if cycle.period > 0 && cycle.closes(at, out) {
                        let bytes = at - cycle.at;
                        let times = (piece.len() - at).saturating_sub(2 * vocab.longest() + bytes) / bytes;
                        repeat::again(out, cycle.end, times);
                        at += times * bytes;
                        (copied, cycle.period) = (out.len(), 0);
                    }
                    if at == piece.len() {
                        return true;
                    }
                    token = self.longest(&piece[at..]);
                    continue;
                }
            }
            while token == NONE {
                // No token goes on from here: this border is wrong, so the token before it was.
                failed[at / 64] |= 1 << (at % 64);
                if out.len() == copied && copied > base {
                    out.truncate(base);
                    return false;
                }
                let last = out.pop().expect("some sequence of tokens is what merging makes");
                at -= self.lengths[last as usize] as usize;
                token = self.shorter[last as usize];
                cycle.cut(at, out.len());
            }
        }
    }
}

/// The tokens since one of them, in a piece that is a few bytes over and over.
struct Cycle {
    /// Zero: not looked for.
    period: usize,
    /// Where the first token ends in the piece, and in the ids.
    at: usize,
    end: usize,
    /// How many tokens to wait for that one again.
    patience: usize,
}

impl Cycle {
    /// Whether the last of the ids is the first token again, at the same place of the period. Now and then the last
    /// becomes the first.
    fn closes(&mut self, at: usize, out: &[u32]) -> bool {
        let since = out.len() - self.end;
        if since > 0
            && self.at > 0
            && (at - self.at).is_multiple_of(self.period)
            && out[out.len() - 1] == out[self.end - 1]
        {
            return true;
        }
        if since >= self.patience {
            (self.at, self.end, self.patience) = (at, out.len(), self.patience * 2);
        }
        false
    }

    /// The ids from `end` on are gone.
    fn cut(&mut self, at: usize, end: usize) {
        if end < self.end {
            (self.at, self.end) = (at, end);
        }
    }
}

/// Of how few bytes a long piece is made over and over: a character, or a few that make one picture. Zero: of more.
fn period(piece: &[u8]) -> usize {
    const SHORTEST: usize = 256;
    const LONGEST: usize = 32;
    let is = |&period: &usize| shared_prefix(piece, &piece[period..]) == piece.len() - period;
    if piece.len() < SHORTEST { 0 } else { (1..=LONGEST).find(is).unwrap_or(0) }
}

/// What each token was merged from, and proof that merging makes every token of its bytes.
fn halves(vocab: &Vocab) -> Option<Vec<(u32, u32)>> {
    let mut tokens = Tokens { vocab, halves: Vec::new(), next: 0, lengths: 2..=16, all: true };
    tokens.halves.extend((0..vocab.id_bound()).map(|id| (id, id)));
    lanes::merge::<16>(vocab, &mut tokens);
    (tokens.next, tokens.lengths) = (0, 17..=lanes::MOST);
    lanes::merge::<{ lanes::MOST }>(vocab, &mut tokens);
    (tokens.next, tokens.lengths) = (0, lanes::MOST + 1..=usize::MAX);
    let mut scratch = Scratch::default();
    let mut parts = Vec::new();
    while let Some((number, token, limit)) = tokens.next() {
        parts.clear();
        scratch.set_limit(limit);
        scratch.merge(vocab, token, &mut parts);
        tokens.done(number, &parts);
    }
    tokens.all.then_some(tokens.halves)
}

/// The tokens that have some number of bytes, each to be merged without itself and what came after it.
struct Tokens<'a> {
    vocab: &'a Vocab,
    halves: Vec<(u32, u32)>,
    next: u32,
    lengths: RangeInclusive<usize>,
    /// Whether all so far are made of two earlier ones.
    all: bool,
}

impl<'a> Work for Tokens<'a> {
    fn next(&mut self) -> Option<(usize, &'a [u8], u32)> {
        while self.next < self.vocab.id_bound() {
            let id = self.next;
            self.next += 1;
            match self.vocab.bytes(id) {
                Some(token) if self.lengths.contains(&token.len()) => return Some((id as usize, token, id)),
                _ => {}
            }
        }
        None
    }

    fn done(&mut self, number: usize, parts: &[u32]) {
        match parts {
            [left, right] if (*left.max(right) as usize) < number => self.halves[number] = (*left, *right),
            _ => self.all = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Pattern, Trainer};

    fn vocab() -> Vocab {
        let mut trainer = Trainer::new(Pattern::new("ghostvis").unwrap(), 1);
        trainer
            .feed(&["abcab abba bcbcbc aaaa aaaaaaa cabbac ababab aabbcc cacaca bbbbb acbacb abcabcabc".repeat(3)])
            .unwrap();
        let merges = trainer.finish(60, 1, |_| Ok(())).unwrap();
        Vocab::from_merges(&std::array::from_fn::<u8, 256, _>(|i| i as u8), &merges).unwrap()
    }

    /// One to five letters over and over, cut anywhere.
    fn periodic() -> impl Strategy<Value = String> {
        (prop_oneof!["[abc]{1,5}", "[abc]{6,40}"], 200..1200usize)
            .prop_map(|(unit, len)| unit.chars().cycle().take(len).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn left_to_right_gives_what_merging_gives(piece in prop_oneof!["[abc]{1,12}", "[abc]{1,300}", "a{1,300}", "[ab]{1,200}", periodic()]) {
            let vocab = vocab();
            let (mut fast, mut slow) = (Vec::new(), Vec::new());
            Prefixes::new(&vocab).unwrap().encode(&vocab, piece.as_bytes(), &mut Steps::default(), &mut fast);
            Scratch::default().merge(&vocab, piece.as_bytes(), &mut slow);
            prop_assert_eq!(fast, slow);
        }
    }

    #[test]
    fn a_vocabulary_that_merging_did_not_make_has_no_prefixes() {
        let mut tokens: Vec<(Vec<u8>, u32)> = (0..=255u8).map(|b| (vec![b], u32::from(b))).collect();
        tokens.push((b"abc".to_vec(), 256));
        assert!(Prefixes::new(&Vocab::new(&tokens).unwrap()).is_none());
    }
}
