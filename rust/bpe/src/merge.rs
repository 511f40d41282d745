//! The merge loop of training, with work in proportion to the occurrences that a merge touches.
//!
//! The distinct pieces lie in one array of ids with a cell per byte. A token of n bytes writes its id into its first
//! and its last cell, so both neighbours of any token are one step away; the cells where two tokens met are cleared.
//! A pair can gain occurrences only in the step that makes its newer token, so its list of positions is written once
//! and its count only falls: a heap of possibly stale counts, corrected when popped, gives the true maximum.
//!
//! Most pairs occur once or twice and are never merged. As counts only fall, a pair below a threshold that the merges
//! wanted will probably not reach needs no list, no table entry and no place in the heap; if they do reach it, all is
//! counted again with a lower one. The merges are the same.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::count::PieceCounts;
use crate::error::{Error, Result};
use crate::runs::prefetch;

/// Between pieces, and before the first.
const BORDER: u32 = u32::MAX;
/// Inside a token.
const INSIDE: u32 = u32::MAX - 1;

type Pair = (u32, u32);

/// The first threshold is what a pair would count if all pairs of bytes were spread over this many times the merges
/// wanted. On 19 MB of mixed text and 50,048 merges this and `AHEAD` took training from 0.60 to 0.33 s.
const SPARE: i64 = 64;
/// By how much the threshold falls.
const FALL: i64 = 8;
/// How many positions ahead a cell is asked for.
const AHEAD: usize = 16;
/// The number in `Side::occurrences` of a neighbour whose pair stays unknown.
const SKIPPED: u32 = u32::MAX;

/// Positions are u32, which leaves room for 4 GB of distinct pieces.
pub fn check_room(pieces: &PieceCounts) -> Result<()> {
    let most = INSIDE as usize - 1;
    if pieces.cells() > most {
        let found = pieces.cells();
        return Error::value(format!("texts: {found} bytes of distinct pieces, the most is {most}. Train on a sample"));
    }
    Ok(())
}

#[derive(Debug)]
struct Live {
    count: i64,
    start: usize,
    len: u32,
}

/// Changes of one step by neighbour id: weight and number of occurrences beside the new token.
#[derive(Debug, Default)]
struct Side {
    weight: Vec<i64>,
    occurrences: Vec<u32>,
    touched: Vec<u32>,
    events: Vec<(u32, u32)>, // (neighbour, position of the new pair)
}

impl Side {
    fn add(&mut self, neighbour: u32, weight: i64, position: u32) {
        let n = neighbour as usize;
        if self.occurrences[n] == 0 {
            self.touched.push(neighbour);
        }
        self.occurrences[n] += 1;
        self.weight[n] += weight;
        self.events.push((neighbour, position));
    }
}

#[derive(Debug)]
pub struct Merger {
    cells: Vec<u32>,
    lengths: Vec<u32>,
    weights: Weights,
    pairs: HashMap<Pair, Live, FxBuildHasher>,
    positions: Vec<u32>,
    /// How long `positions` may become before the lists of merged pairs are thrown out.
    most_positions: usize,
    heap: BinaryHeap<(i64, Reverse<Pair>)>,
    min_frequency: i64,
    /// Pairs below are not known.
    threshold: i64,
    left: Side,
    right: Side,
}

impl Merger {
    /// `bytes`: the byte of each of the first 256 ids. `wanted`: how many merges are going to be asked for, about.
    pub fn new(pieces: PieceCounts, bytes: &[u8; 256], min_frequency: i64, wanted: usize) -> Result<Self> {
        check_room(&pieces)?;
        let mut ids = [0u32; 256];
        (0..).zip(bytes).for_each(|(id, &byte)| ids[byte as usize] = id);
        let mut cells = Vec::with_capacity(pieces.cells() + 1);
        let mut weights = Weights::default();
        cells.push(BORDER);
        // Equal counts together; which of them comes first changes nothing.
        pieces.each_by_count(|piece, count| {
            cells.extend(piece.iter().map(|&byte| ids[byte as usize]));
            cells.push(BORDER);
            weights.push(count, cells.len() as u32);
        });
        let mut merger = Self {
            cells,
            lengths: vec![1; 256],
            weights,
            pairs: HashMap::default(),
            positions: Vec::new(),
            most_positions: 0,
            heap: BinaryHeap::new(),
            min_frequency,
            threshold: min_frequency,
            left: Side::default(),
            right: Side::default(),
        };
        merger.count_byte_pairs(wanted);
        Ok(merger)
    }

    fn count_byte_pairs(&mut self, wanted: usize) {
        let mut weight = vec![0i64; 1 << 16];
        let mut next = vec![0usize; (1 << 16) + 1];
        let slot = |w: &[u32]| if w[0] == BORDER || w[1] == BORDER { None } else { Some((w[0] << 8 | w[1]) as usize) };
        let mut run = 0;
        for (i, window) in self.cells.windows(2).enumerate() {
            if let Some(s) = slot(window) {
                weight[s] += self.weights.at(i as u32, &mut run);
                next[s + 1] += 1;
            }
        }
        for s in 0..1 << 16 {
            next[s + 1] += next[s];
        }
        self.positions = vec![0; next[1 << 16]];
        let starts = next.clone();
        for (i, window) in self.cells.windows(2).enumerate() {
            if let Some(s) = slot(window) {
                self.positions[next[s]] = i as u32;
                next[s] += 1;
            }
        }
        let total: i64 = weight.iter().sum();
        self.threshold = self.min_frequency.max(total / (wanted.max(1) as i64).saturating_mul(SPARE));
        for s in 0..1 << 16 {
            let pair = ((s >> 8) as u32, (s & 255) as u32);
            self.admit(pair, weight[s], starts[s], (starts[s + 1] - starts[s]) as u32);
        }
    }

    fn admit(&mut self, pair: Pair, count: i64, start: usize, len: u32) {
        if count >= self.threshold {
            self.pairs.insert(pair, Live { count, start, len });
            self.heap.push((count, Reverse(pair)));
        }
    }

    /// Merges the most frequent pair and returns it; `None` when no pair is frequent enough.
    pub fn step(&mut self) -> Option<Pair> {
        if self.positions.len() > self.most_positions {
            self.compact();
        }
        let (pair, live) = self.pop()?;
        let new = self.lengths.len() as u32;
        self.lengths.push(self.lengths[pair.0 as usize] + self.lengths[pair.1 as usize]);
        for side in [&mut self.left, &mut self.right] {
            side.weight.resize(new as usize + 1, 0);
            side.occurrences.resize(new as usize + 1, 0);
        }
        self.rewrite(pair, new, &live);
        self.settle_left(pair, new);
        self.settle_right(pair, new);
        Some(pair)
    }

    /// Throws out the positions of pairs that were merged or given up. A quarter more may follow before the next time: on
    /// 200 MB of mixed text this took 19 MB of 122 off the peak, and no time that could be measured.
    fn compact(&mut self) {
        let Self { pairs, positions, .. } = self;
        let mut kept: Vec<&mut Live> = pairs.values_mut().collect();
        kept.sort_unstable_by_key(|live| live.start);
        let mut end = 0;
        for live in kept {
            let len = live.len as usize;
            positions.copy_within(live.start..live.start + len, end);
            live.start = end;
            end += len;
        }
        positions.truncate(end);
        self.most_positions = end + end / 4;
    }

    fn pop(&mut self) -> Option<(Pair, Live)> {
        loop {
            if let Some(found) = self.pop_known() {
                return Some(found);
            }
            if self.threshold == self.min_frequency {
                return None;
            }
            self.threshold = self.min_frequency.max(self.threshold / FALL);
            self.count_again();
        }
    }

    /// Calls `each` with the position, pair and weight of every two neighbours.
    fn neighbours(cells: &[u32], lengths: &[u32], weights: &Weights, mut each: impl FnMut(u32, Pair, i64)) {
        let (mut at, mut run) = (1, 0);
        while at < cells.len() {
            let left = cells[at];
            if left == BORDER {
                at += 1;
                continue;
            }
            let next = at + lengths[left as usize] as usize;
            if cells[next] != BORDER {
                each(at as u32, (left, cells[next]), weights.at(at as u32, &mut run));
            }
            at = next;
        }
    }

    /// Finds all pairs that reach the threshold, with their positions, from the cells alone.
    fn count_again(&mut self) {
        let Self { cells, lengths, weights, pairs, positions, heap, threshold, .. } = self;
        let mut found: HashMap<Pair, (i64, u32), FxBuildHasher> = HashMap::default();
        Self::neighbours(cells, lengths, weights, |_, pair, weight| {
            let entry = found.entry(pair).or_default();
            entry.0 += weight;
            entry.1 += 1;
        });
        pairs.clear();
        heap.clear();
        let mut start = 0;
        for (pair, (count, occurrences)) in found.into_iter().filter(|(_, found)| found.0 >= *threshold) {
            pairs.insert(pair, Live { count, start, len: 0 });
            heap.push((count, Reverse(pair)));
            start += occurrences as usize;
        }
        positions.clear();
        positions.resize(start, 0);
        Self::neighbours(cells, lengths, weights, |at, pair, _| {
            if let Some(live) = pairs.get_mut(&pair) {
                positions[live.start + live.len as usize] = at;
                live.len += 1;
            }
        });
    }

    fn pop_known(&mut self) -> Option<(Pair, Live)> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            let now = self.pairs[&pair].count;
            if now == count {
                let live = self.pairs.remove(&pair).expect("found a line above");
                return Some((pair, live));
            }
            if now >= self.threshold {
                self.heap.push((now, Reverse(pair)));
            } else {
                self.pairs.remove(&pair);
            }
        }
        None
    }

    /// Puts `new` wherever the pair stands and notes its neighbours on both sides.
    fn rewrite(&mut self, (a, b): Pair, new: u32, live: &Live) {
        let len_a = self.lengths[a as usize] as usize;
        let len = self.lengths[new as usize] as usize;
        let is_pair = |cells: &[u32], at: usize| cells[at] == a && cells[at + len_a] == b;
        let mut run = 0;
        let end = live.start + live.len as usize;
        for k in live.start..end {
            if let Some(&ahead) = self.positions[..end].get(k + AHEAD) {
                prefetch(&self.cells[ahead as usize]);
            }
            let at = self.positions[k] as usize;
            if !is_pair(&self.cells, at) {
                continue; // a neighbour took one half
            }
            let weight = self.weights.at(at as u32, &mut run);
            self.cells[at + len_a - 1] = INSIDE;
            self.cells[at + len_a] = INSIDE;
            self.cells[at] = new;
            self.cells[at + len - 1] = new;
            let before = self.cells[at - 1];
            if before != BORDER {
                let start = at - self.lengths[before as usize] as usize;
                self.left.add(before, weight, start as u32);
            }
            let after = self.cells[at + len];
            // An occurrence that follows at once is going to be `new` itself, and notes the pair from its left.
            if after != BORDER && !is_pair(&self.cells, at + len) {
                self.right.add(after, weight, at as u32);
            }
        }
    }

    /// (x, a) becomes (x, new); where x is `new` itself, it was (b, a) that vanished.
    fn settle_left(&mut self, (a, b): Pair, new: u32) {
        let mut side = std::mem::take(&mut self.left);
        let starts = self.place(&mut side);
        for (&x, start) in side.touched.iter().zip(starts) {
            let weight = std::mem::take(&mut side.weight[x as usize]);
            let len = std::mem::take(&mut side.occurrences[x as usize]);
            self.lose((if x == new { b } else { x }, a), weight);
            self.admit((x, new), weight, start, len);
        }
        side.touched.clear();
        self.left = side;
    }

    /// (b, y) becomes (new, y).
    fn settle_right(&mut self, (_, b): Pair, new: u32) {
        let mut side = std::mem::take(&mut self.right);
        let starts = self.place(&mut side);
        for (&y, start) in side.touched.iter().zip(starts) {
            let weight = std::mem::take(&mut side.weight[y as usize]);
            let len = std::mem::take(&mut side.occurrences[y as usize]);
            self.lose((b, y), weight);
            self.admit((new, y), weight, start, len);
        }
        side.touched.clear();
        self.right = side;
    }

    /// Sorts the events of a side by neighbour into `positions`, those of pairs that reach the threshold; returns where
    /// each neighbour's list starts.
    fn place(&mut self, side: &mut Side) -> Vec<usize> {
        let mut starts = Vec::with_capacity(side.touched.len());
        let mut next = self.positions.len();
        for (i, &n) in side.touched.iter().enumerate() {
            starts.push(next);
            // From here on `occurrences` holds the neighbour's index in `starts`; restored below.
            let slot = &mut side.occurrences[n as usize];
            if side.weight[n as usize] >= self.threshold {
                next += *slot as usize;
                *slot = i as u32;
            } else {
                *slot = SKIPPED;
            }
        }
        self.positions.resize(next, 0);
        let mut cursor = starts.clone();
        for (neighbour, position) in side.events.drain(..) {
            let index = side.occurrences[neighbour as usize];
            if index != SKIPPED {
                let cursor = &mut cursor[index as usize];
                self.positions[*cursor] = position;
                *cursor += 1;
            }
        }
        for (i, &n) in side.touched.iter().enumerate() {
            side.occurrences[n as usize] = (cursor[i] - starts[i]) as u32;
        }
        starts
    }

    /// Pairs that were never admitted, and the pair just merged, are not in the table.
    fn lose(&mut self, pair: Pair, weight: i64) {
        if let Some(live) = self.pairs.get_mut(&pair) {
            live.count -= weight;
        }
    }
}

/// How often the piece around a position occurs. Pieces are sorted by count, so equal counts form runs.
#[derive(Debug, Default)]
struct Weights {
    ends: Vec<u32>,
    counts: Vec<i64>,
}

impl Weights {
    fn push(&mut self, count: i64, end: u32) {
        match (self.counts.last(), self.ends.last_mut()) {
            (Some(&last), Some(last_end)) if last == count => *last_end = end,
            _ => {
                self.counts.push(count);
                self.ends.push(end);
            }
        }
    }

    /// `run` is the caller's cursor; positions are asked in ascending order.
    fn at(&self, position: u32, run: &mut usize) -> i64 {
        if position >= self.ends[*run] {
            *run += self.ends[*run..].partition_point(|&end| end <= position);
        }
        self.counts[*run]
    }
}
