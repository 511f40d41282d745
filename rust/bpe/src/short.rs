//! The ids of a short piece: look at all ranks, merge the lowest, until none is left.

use crate::vocab::Vocab;

/// One bit of a word per byte of the piece.
pub const MOST: usize = 64;
const PLACE_BITS: u32 = MOST.ilog2();
/// No merge. Ids have 24 bits, so a rank and its place have 30.
const NEVER: i32 = i32::MAX;

/// Appends the ids of `piece`, at most `MOST` bytes, by merging alone; tokens from `limit` on are hidden.
pub fn merge(vocab: &Vocab, piece: &[u8], limit: u32, out: &mut Vec<u32>) {
    // In steps of sixteen, so that the look at all of them is a few vector instructions without a rest.
    match piece.len() {
        ..=16 => merge_in::<16>(vocab, piece, limit, out),
        17..=32 => merge_in::<32>(vocab, piece, limit, out),
        _ => merge_in::<MOST>(vocab, piece, limit, out),
    }
}

#[inline(always)]
fn merge_in<const N: usize>(vocab: &Vocab, piece: &[u8], limit: u32, out: &mut Vec<u32>) {
    // `ids[i]` is a token where bit `i` of `heads` is set; `ranks[i]` is what it would become with the next one, with
    // the place in the last bits: the leftmost of the lowest is the minimum.
    let (mut ids, mut ranks) = ([0u32; N], [NEVER; N]);
    let rank = |id: u32, at: usize| if id < limit { (id << PLACE_BITS | at as u32) as i32 } else { NEVER };
    for (i, &byte) in piece.iter().enumerate() {
        ids[i % N] = vocab.byte_id(byte);
    }
    for (i, pair) in piece.windows(2).enumerate() {
        ranks[i % N] = rank(vocab.byte_pair(pair[0], pair[1]), i);
    }
    let mut heads = u64::MAX >> (u64::BITS as usize - piece.len());
    loop {
        let lowest = ranks.iter().fold(NEVER, |lowest, &rank| lowest.min(rank));
        if lowest == NEVER {
            break;
        }
        let at = lowest as usize % N;
        let id = lowest as u32 >> PLACE_BITS;
        ids[at] = id;
        let behind = heads & (u64::MAX - 1) << at;
        ranks[behind.trailing_zeros() as usize % N] = NEVER;
        heads ^= behind & behind.wrapping_neg();
        let after = behind & behind.wrapping_sub(1);
        let before = heads & ((1 << at) - 1);
        // The look to the left waits for no answer from the right: the table lies in the last cache.
        let previous = (before | 1).ilog2() as usize % N;
        vocab.ask_for_pair(ids[previous], id);
        ranks[at] = if after == 0 { NEVER } else { rank(vocab.pair(id, ids[after.trailing_zeros() as usize % N]), at) };
        if before != 0 {
            ranks[previous] = rank(vocab.pair(ids[previous], id), previous);
        }
    }
    while heads != 0 {
        out.push(ids[heads.trailing_zeros() as usize % N]);
        heads &= heads - 1;
    }
}
