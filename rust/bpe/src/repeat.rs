//! The ids of one byte many times over, by merging whole runs of equal tokens at once.
//!
//! A megabyte of blanks is one piece. A vocabulary with tokens of every number of blanks has thousands of sequences to
//! try for it from left to right (2 MB/s); merging halves it some twenty times and hardly depends on its length.

use crate::vocab::{NONE, Vocab};

/// Neighbouring runs hold different tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    token: u32,
    count: usize,
}

/// A vocabulary that needs more is left to the other ways.
const MOST_RUNS: usize = 24;
const MOST_STEPS: usize = 4096;

/// Appends the ids of `piece` if it is one byte repeated; false, and nothing appended, if it is not, or takes too long.
pub fn merge(vocab: &Vocab, piece: &[u8], limit: u32, out: &mut Vec<u32>) -> bool {
    if piece[1..] != piece[..piece.len() - 1] {
        return false;
    }
    let pair = |left: u32, right: u32| {
        let id = vocab.pair(left, right);
        if id < limit { id } else { NONE }
    };
    let mut runs = vec![Run { token: vocab.byte_id(piece[0]), count: piece.len() }];
    for _ in 0..MOST_STEPS {
        // The leftmost of the lowest ranks: within run `i`, or from its last token to the next run.
        let (mut lowest, mut at, mut inside) = (NONE, 0, false);
        for (i, run) in runs.iter().enumerate() {
            let within = if run.count > 1 { pair(run.token, run.token) } else { NONE };
            let across = runs.get(i + 1).map_or(NONE, |next| pair(run.token, next.token));
            if within < lowest {
                (lowest, at, inside) = (within, i, true);
            }
            if across < lowest {
                (lowest, at, inside) = (across, i, false);
            }
        }
        if lowest == NONE {
            out.extend(runs.iter().flat_map(|run| std::iter::repeat_n(run.token, run.count)));
            return true;
        }
        let run = runs[at];
        if inside {
            // All pairs of the run follow each other, unless a merge with what the first of them made comes before.
            let before = if at > 0 { pair(runs[at - 1].token, lowest) } else { NONE };
            let sooner = before.min(pair(lowest, run.token)).min(pair(lowest, lowest));
            let merges = if sooner > lowest { run.count / 2 } else { 1 };
            let rest = Run { count: run.count - 2 * merges, ..run };
            replace(&mut runs, at, 1, &[Run { token: lowest, count: merges }, rest]);
        } else {
            let next = runs[at + 1];
            let one_less = |run: Run| Run { count: run.count - 1, ..run };
            replace(&mut runs, at, 2, &[one_less(run), Run { token: lowest, count: 1 }, one_less(next)]);
        }
        if runs.len() > MOST_RUNS {
            return false;
        }
    }
    false
}

/// Appends `out[first..]` as often as `times` says.
pub fn again(out: &mut Vec<u32>, first: usize, times: usize) {
    let len = out.len() - first;
    let end = out.len() + len * times;
    out.reserve(len * times);
    // What was appended is copied with the rest, so that few and long copies are made.
    while out.len() < end {
        let most = (out.len() - first).min(end - out.len());
        out.extend_from_within(first..first + most);
    }
}

/// Puts `new` for `len` runs from `at` on; empty runs vanish, and equal neighbours become one.
fn replace(runs: &mut Vec<Run>, at: usize, len: usize, new: &[Run]) {
    runs.splice(at..at + len, new.iter().copied());
    runs.retain(|run| run.count > 0);
    runs.dedup_by(|run, before| {
        let equal = run.token == before.token;
        if equal {
            before.count += run.count;
        }
        equal
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::encode::Scratch;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Tokens of any lengths with any ranks, also ones that no merges make.
        #[test]
        fn whole_runs_give_what_single_merges_give(
            lengths in prop::collection::vec(2..40usize, 0..30),
            len in 2..400usize,
            limit in prop_oneof![Just(NONE), 256..290u32],
        ) {
            let mut tokens: Vec<(Vec<u8>, u32)> = (0..=255u8).map(|b| (vec![b], u32::from(b))).collect();
            for length in lengths {
                let token = vec![b'x'; length];
                if tokens.iter().all(|(known, _)| *known != token) {
                    tokens.push((token, tokens.len() as u32));
                }
            }
            let vocab = Vocab::new(&tokens).unwrap();
            let piece = vec![b'x'; len];
            let (mut fast, mut slow) = (Vec::new(), Vec::new());
            if merge(&vocab, &piece, limit, &mut fast) {
                let mut scratch = Scratch::with_limit(limit);
                scratch.merge_by_heap(&vocab, &piece, &mut slow);
                prop_assert_eq!(fast, slow);
            }
        }
    }

    #[test]
    fn doubling_tokens_and_a_hundred_megabytes_take_few_steps() {
        let tokens: Vec<(Vec<u8>, u32)> =
            (0..=255u8).map(|b| vec![b]).chain((1..7).map(|i| vec![b' '; 1 << i])).zip(0..).collect();
        let vocab = Vocab::new(&tokens).unwrap();
        let mut out = Vec::new();
        assert!(merge(&vocab, &vec![b' '; 100_000_003], NONE, &mut out));
        assert_eq!(out.len(), 100_000_000 / 64 + 2);
        assert_eq!(out[out.len() - 3..], [261, 257 - 1, 32]);
        assert!(!merge(&vocab, b"  x", NONE, &mut out));
    }
}
