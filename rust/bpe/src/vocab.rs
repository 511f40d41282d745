//! The tokens and the two tables that encoding looks into: bytes to id, and pair of ids to id.
//!
//! Merging follows ranks as tiktoken does: the id is the rank, and any two neighbours whose bytes together are a
//! token may merge. So the pair table holds every split of every token into two tokens.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hashbrown::hash_table::Entry;
use hashbrown::{HashSet, HashTable};
use rustc_hash::FxBuildHasher;

use crate::backtrack::Prefixes;

use crate::count::hash_bytes;
use crate::error::{Error, Result};
use crate::pairs::Pairs;

pub const NONE: u32 = u32::MAX;
/// Forty merges that each double a token would ask for a terabyte; a damaged file must not take the machine down.
const MAX_BYTES: usize = 1 << 28;
/// Pairs looked up by their bytes before the table of pairs is made: it takes 25 ms for cl100k's 100,000 tokens, a look
/// by bytes 30 ns.
const FEW: u32 = 4096;

#[derive(Debug)]
pub struct Vocab {
    arena: Vec<u8>,
    /// Token `id` is `arena[offsets[id]..offsets[id + 1]]`; an id without a token is empty.
    offsets: Vec<usize>,
    tokens: usize,
    by_bytes: HashTable<u32>,
    byte_ids: [u32; 256],
    /// `left << 8 | right`, both bytes: the id of the two together.
    byte_pairs: Vec<u32>,
    /// Made when merging has asked `FEW` times, so that loading does not wait for it.
    pairs: OnceLock<Pairs>,
    asked: AtomicU32,
    /// Bytes of the longest token.
    longest: usize,
    /// Made when the first long piece comes.
    prefixes: OnceLock<Option<Prefixes>>,
    instance: u64,
}

/// The next number of `instance`; zero belongs to nobody.
static INSTANCES: AtomicU64 = AtomicU64::new(1);

/// Bytes as Python and rustc print them, for messages.
pub fn show(bytes: &[u8]) -> String {
    format!("b\"{}\"", bytes.escape_ascii())
}

impl Vocab {
    /// From tokens and their ids, in any order. Every single byte must be a token; ids may leave gaps.
    pub fn new<B: AsRef<[u8]>>(tokens: &[(B, u32)]) -> Result<Self> {
        let mut sorted: Vec<(&[u8], u32)> = tokens.iter().map(|(b, id)| (b.as_ref(), *id)).collect();
        sorted.sort_unstable_by_key(|t| t.1);
        let mut vocab = Self {
            arena: Vec::with_capacity(sorted.iter().map(|t| t.0.len()).sum()),
            offsets: Vec::with_capacity(sorted.len() + 1),
            tokens: sorted.len(),
            by_bytes: HashTable::with_capacity(sorted.len()),
            byte_ids: [NONE; 256],
            byte_pairs: Vec::new(),
            pairs: OnceLock::new(),
            asked: AtomicU32::new(0),
            longest: sorted.iter().map(|t| t.0.len()).max().unwrap_or(0),
            prefixes: OnceLock::new(),
            instance: INSTANCES.fetch_add(1, Ordering::Relaxed),
        };
        for (bytes, id) in sorted {
            vocab.push(bytes, id)?;
        }
        vocab.offsets.push(vocab.arena.len());
        for byte in 0..=255u8 {
            vocab.byte_ids[byte as usize] = match vocab.id(&[byte]) {
                Some(id) => id,
                None => return Error::value(format!("vocabulary: the single byte {} is not a token", show(&[byte]))),
            };
        }
        vocab.index_byte_pairs();
        Ok(vocab)
    }

    /// From the bytes in id order and the merges that follow them.
    pub fn from_merges(bytes: &[u8], merges: &[(u32, u32)]) -> Result<Self> {
        let mut tokens: Vec<(Vec<u8>, u32)> = (0u32..).zip(bytes).map(|(id, &b)| (vec![b], id)).collect();
        let mut total = 0;
        for (i, &(left, right)) in merges.iter().enumerate() {
            let part = |id: u32| match tokens.get(id as usize) {
                Some((bytes, _)) => Ok(bytes.as_slice()),
                None => Error::value(format!(
                    "merge {i}, ({left}, {right}): id {id} does not exist yet, the largest so far is {}",
                    tokens.len() - 1
                )),
            };
            let (left_bytes, right_bytes) = (part(left)?, part(right)?);
            total += left_bytes.len() + right_bytes.len();
            if total > MAX_BYTES {
                return Error::value(format!(
                    "merge {i}, ({left}, {right}): the tokens together exceed {MAX_BYTES} bytes"
                ));
            }
            let token = [left_bytes, right_bytes].concat();
            tokens.push((token, tokens.len() as u32));
        }
        Self::new(&tokens)
    }

    fn push(&mut self, bytes: &[u8], id: u32) -> Result<()> {
        if id as usize >= crate::train::MAX_VOCAB_SIZE {
            return Error::value(format!("vocabulary: id {id} of token {} is too large", show(bytes)));
        }
        if bytes.is_empty() {
            return Error::value(format!("vocabulary: token {id} is empty"));
        }
        if self.offsets.len() > id as usize {
            return Error::value(format!("vocabulary: id {id} is given twice, once to {}", show(bytes)));
        }
        self.offsets.resize(id as usize + 1, self.arena.len());
        let Self { arena, offsets, by_bytes, .. } = self;
        // While tokens are pushed in id order, the next offset is not there yet for the newest one only.
        let bytes_of = |id: u32| {
            let end = offsets.get(id as usize + 1).copied().unwrap_or(arena.len());
            &arena[offsets[id as usize]..end]
        };
        match by_bytes.entry(hash_bytes(bytes), |&id| bytes_of(id) == bytes, |&id| hash_bytes(bytes_of(id))) {
            Entry::Occupied(other) => {
                let other = *other.get();
                Error::value(format!("vocabulary: token {} has two ids, {other} and {id}", show(bytes)))
            }
            Entry::Vacant(place) => {
                place.insert(id);
                self.arena.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn index_byte_pairs(&mut self) {
        let mut byte_pairs = vec![NONE; 1 << 16];
        for id in 0..self.id_bound() {
            if let Some([left, right]) = self.bytes(id) {
                byte_pairs[(*left as usize) << 8 | *right as usize] = id;
            }
        }
        self.byte_pairs = byte_pairs;
    }

    fn all_pairs(&self) -> Pairs {
        // A corpus of one repeated letter makes tokens of any length; no cut is looked up unless tokens of both
        // lengths exist, which keeps such a token from costing its length squared.
        let lengths: HashSet<usize, FxBuildHasher> =
            (0..self.id_bound()).filter_map(|id| self.bytes(id)).map(<[u8]>::len).collect();
        let mut pairs = Vec::with_capacity(self.tokens * 2);
        for id in 0..self.id_bound() {
            let Some(token) = self.bytes(id) else { continue };
            let cuts = 1..token.len();
            for cut in cuts.filter(|cut| lengths.contains(cut) && lengths.contains(&(token.len() - cut))) {
                if let Some(left) = self.id(&token[..cut])
                    && let Some(right) = self.id(&token[cut..])
                {
                    pairs.push((left, right, id));
                }
            }
        }
        Pairs::new(&pairs)
    }

    /// One more than the largest id.
    pub fn id_bound(&self) -> u32 {
        (self.offsets.len() - 1) as u32
    }

    /// The number of tokens; less than `id_bound` where ids leave gaps.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The bytes of a token, `None` for an id that has none.
    #[inline]
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let i = id as usize;
        let end = *self.offsets.get(i + 1)?;
        let start = self.offsets[i];
        if start == end { None } else { Some(&self.arena[start..end]) }
    }

    /// Sixteen bytes of which the first are those of a token of at most sixteen, and how many. `None` for a longer
    /// token, one at the end of the memory of tokens, and an id without a token.
    #[inline]
    pub fn block(&self, id: u32) -> Option<(&[u8; 16], usize)> {
        let end = *self.offsets.get(id as usize + 1)?;
        let start = self.offsets[id as usize];
        let block = self.arena.get(start..start + 16)?.try_into().expect("the range has 16 bytes");
        if (1..=16).contains(&(end - start)) { Some((block, end - start)) } else { None }
    }

    #[inline]
    pub fn id(&self, bytes: &[u8]) -> Option<u32> {
        if bytes.len() > self.longest {
            return None;
        }
        let end = |id: u32| self.offsets.get(id as usize + 1).copied().unwrap_or(self.arena.len());
        let same = |&id: &u32| &self.arena[self.offsets[id as usize]..end(id)] == bytes;
        self.by_bytes.find(hash_bytes(bytes), same).copied()
    }

    /// What finds the ids of long pieces; `None` where a token is not made of two earlier ones.
    pub fn prefixes(&self) -> Option<&Prefixes> {
        self.prefixes.get_or_init(|| Prefixes::new(self)).as_ref()
    }

    /// Bytes of the longest token.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// A number that no other vocabulary of this process has.
    pub fn instance(&self) -> u64 {
        self.instance
    }

    #[inline(always)]
    pub fn byte_id(&self, byte: u8) -> u32 {
        self.byte_ids[byte as usize]
    }

    /// The id of two bytes together, or `NONE`.
    #[inline(always)]
    pub fn byte_pair(&self, left: u8, right: u8) -> u32 {
        self.byte_pairs[(left as usize) << 8 | right as usize]
    }

    /// Asks for the memory that `pair` is going to read.
    #[inline(always)]
    pub fn ask_for_pair(&self, left: u32, right: u32) {
        if let Some(pairs) = self.pairs.get() {
            pairs.ask(left, right);
        }
    }

    /// The id of two tokens together, or `NONE`.
    #[inline(always)]
    pub fn pair(&self, left: u32, right: u32) -> u32 {
        match self.pairs.get() {
            Some(pairs) => pairs.get(left, right).unwrap_or(NONE),
            None => self.pair_of_few(left, right),
        }
    }

    /// `pair` while the table is not there; makes it where many have asked.
    #[cold]
    #[inline(never)]
    fn pair_of_few(&self, left: u32, right: u32) -> u32 {
        if self.asked.fetch_add(1, Ordering::Relaxed) >= FEW {
            self.pairs.get_or_init(|| self.all_pairs());
            return self.pair(left, right);
        }
        match (self.bytes(left), self.bytes(right)) {
            (Some(left), Some(right)) if left.len() + right.len() <= self.longest => {
                self.id(&[left, right].concat()).unwrap_or(NONE)
            }
            _ => NONE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_has_the_same_id_before_and_after_the_table_is_made() {
        let letters = (0..=255u8).map(|b| (vec![b], u32::from(b)));
        // Ids with gaps; "abc" is made in two ways, and "xyz" in none.
        let longer = [("ab", 300), ("bc", 256), ("abc", 400), ("xyz", 401), ("aaaa", 402), ("aa", 403)];
        let tokens: Vec<_> = letters.chain(longer.map(|(t, id)| (t.as_bytes().to_vec(), id))).collect();
        let vocab = Vocab::new(&tokens).unwrap();
        let every = |vocab: &Vocab| -> Vec<(u32, u32, u32)> {
            let ids: Vec<u32> = ('a'..='d').chain('x'..='z').map(u32::from).chain([256, 257, 300, 400, 403]).collect();
            ids.iter().flat_map(|&l| ids.iter().map(move |&r| (l, r, vocab.pair(l, r)))).collect()
        };
        let before = every(&vocab);
        assert!(vocab.pairs.get().is_none());
        let found: Vec<_> = before.iter().filter(|p| p.2 != NONE).copied().collect();
        let (a, b, c) = (u32::from(b'a'), u32::from(b'b'), u32::from(b'c'));
        assert_eq!(found, [(a, a, 403), (a, b, 300), (a, 256, 400), (b, c, 256), (300, c, 400), (403, 403, 402)]);
        (0..FEW).for_each(|_| _ = vocab.pair(a, b));
        assert!(vocab.pairs.get().is_some());
        assert_eq!(every(&vocab), before);
    }
}
