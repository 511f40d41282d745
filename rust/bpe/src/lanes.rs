//! The ids of several pieces at once.
//!
//! Each merge looks up two pairs in a table of megabytes, and what they say decides which merge is next: alone, a piece
//! waits for memory most of the time. So a few pieces take turns, each asking for its pairs a turn before it needs them.

use crate::vocab::Vocab;

/// The longest piece that any call takes.
pub const MOST: usize = 64;
/// No merge. Ids have 24 bits, so a rank and its place have 30.
const NEVER: i32 = i32::MAX;
/// Pieces under way.
const LANES: usize = 6;

/// Where pieces come from and their ids go.
pub trait Work {
    /// The next piece: its number, its bytes, and the id from which on tokens are hidden.
    fn next(&mut self) -> Option<(usize, &[u8], u32)>;

    /// What piece `number` is after merging alone.
    fn done(&mut self, number: usize, ids: &[u32]);
}

/// A piece under way. `ids[i]` is a token where bit `i` of `heads` is set; `ranks[i]` is what it would become with the
/// next one, with the place in the last bits: the leftmost of the lowest is the minimum.
struct Lane<const N: usize> {
    ids: [u32; N],
    ranks: [i32; N],
    /// Zero in a lane without a piece.
    heads: u64,
    /// Where the last merge was, whose two new pairs are to be looked up. `N`: none.
    merged: usize,
    limit: u32,
    number: usize,
}

impl<const N: usize> Lane<N> {
    const EMPTY: Self = Self { ids: [0; N], ranks: [NEVER; N], heads: 0, merged: N, limit: 0, number: 0 };

    #[inline(always)]
    fn start(&mut self, vocab: &Vocab, (number, bytes, limit): (usize, &[u8], u32)) {
        self.heads = u64::MAX >> (u64::BITS as usize - bytes.len());
        (self.merged, self.limit, self.number) = (N, limit, number);
        for (i, &byte) in bytes.iter().enumerate() {
            self.ids[i % N] = vocab.byte_id(byte);
        }
        // All are `NEVER`, as the last piece left them.
        for (i, pair) in bytes.windows(2).enumerate() {
            self.ranks[i % N] = self.rank(vocab.byte_pair(pair[0], pair[1]), i);
        }
    }

    #[inline(always)]
    fn rank(&self, id: u32, at: usize) -> i32 {
        if id < self.limit { (id << N.ilog2() | at as u32) as i32 } else { NEVER }
    }

    /// The heads before and after the one at `at`; zero where there is none.
    #[inline(always)]
    fn around(&self, at: usize) -> (u64, u64) {
        (self.heads & ((1 << at) - 1), self.heads & (u64::MAX - 1) << at)
    }

    /// Looks up the pairs of the last merge, merges the lowest rank and asks for its pairs. False when there is none.
    #[inline(always)]
    fn step(&mut self, vocab: &Vocab) -> bool {
        if self.merged != N {
            let at = self.merged % N;
            let (before, after) = self.around(at);
            let id = self.ids[at];
            self.ranks[at] = match after {
                0 => NEVER,
                _ => self.rank(vocab.pair(id, self.ids[after.trailing_zeros() as usize % N]), at),
            };
            if before != 0 {
                let previous = before.ilog2() as usize % N;
                self.ranks[previous] = self.rank(vocab.pair(self.ids[previous], id), previous);
            }
        }
        let lowest = self.ranks.iter().fold(NEVER, |lowest, &rank| lowest.min(rank));
        if lowest == NEVER {
            return false;
        }
        let at = lowest as usize % N;
        let id = lowest as u32 >> N.ilog2();
        self.merged = at;
        self.ids[at] = id;
        let behind = self.heads & (u64::MAX - 1) << at;
        self.ranks[behind.trailing_zeros() as usize % N] = NEVER;
        self.heads ^= behind & behind.wrapping_neg();
        let (before, after) = self.around(at);
        // Where there is no neighbour this asks for a pair that nobody needs.
        vocab.ask_for_pair(self.ids[(before | 1).ilog2() as usize % N], id);
        vocab.ask_for_pair(id, self.ids[after.trailing_zeros() as usize % N]);
        true
    }

    /// Hands the ids on and is empty.
    fn finish(&mut self, work: &mut impl Work) {
        let (mut ids, mut len) = ([0; N], 0);
        while self.heads != 0 {
            ids[len % N] = self.ids[self.heads.trailing_zeros() as usize % N];
            len += 1;
            self.heads &= self.heads - 1;
        }
        work.done(self.number, &ids[..len]);
    }
}

/// Merges all pieces, which have 1 to `N` bytes, `N` at most 64.
pub fn merge<const N: usize>(vocab: &Vocab, work: &mut impl Work) {
    let mut lanes = [const { Lane::<N>::EMPTY }; LANES];
    let mut busy = 0;
    for lane in &mut lanes {
        let Some(piece) = work.next() else { break };
        lane.start(vocab, piece);
        busy += 1;
    }
    while busy > 0 {
        for lane in &mut lanes {
            if lane.heads == 0 || lane.step(vocab) {
                continue;
            }
            lane.finish(work);
            match work.next() {
                Some(piece) => lane.start(vocab, piece),
                None => busy -= 1,
            }
        }
    }
}
