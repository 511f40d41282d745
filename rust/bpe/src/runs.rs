//! Sixteen bytes at a time: where a run of ASCII letters ends, and a hint to the cache.

/// The bits of the ASCII letters among 16 bytes, the first byte's lowest.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn letters(block: &[u8; 16]) -> u32 {
    use std::arch::x86_64::{
        _mm_add_epi8, _mm_cmplt_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi8,
    };
    // Lower case, then 'a'..='z' shifted to the 26 smallest signed bytes, so that one comparison finds them.
    const TO_SMALLEST: i8 = (0x80 - 0x61) as i8;
    // SAFETY: SSE2 is part of x86-64, and the block is 16 readable bytes; the load needs no alignment.
    unsafe {
        let bytes = _mm_loadu_si128(block.as_ptr().cast());
        let lower = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
        let shifted = _mm_add_epi8(lower, _mm_set1_epi8(TO_SMALLEST));
        _mm_movemask_epi8(_mm_cmplt_epi8(shifted, _mm_set1_epi8(-128 + 26))) as u32
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub fn letters(block: &[u8; 16]) -> u32 {
    block.iter().enumerate().fold(0, |bits, (i, b)| bits | u32::from(b.is_ascii_alphabetic()) << i)
}

/// How many bytes two slices have in common from the start.
pub fn shared_prefix(one: &[u8], other: &[u8]) -> usize {
    let (blocks, others) = (one.as_chunks::<32>().0, other.as_chunks::<32>().0);
    let same = 32 * blocks.iter().zip(others).take_while(|(a, b)| a == b).count();
    same + one[same..].iter().zip(&other[same..]).take_while(|(a, b)| a == b).count()
}

/// Asks for the cache line of `place` before it is needed.
#[inline(always)]
pub fn prefetch<T>(place: &T) {
    prefetch_at(std::ptr::from_ref(place));
}

/// Asks for the cache line of an address, which need not be one.
#[inline(always)]
pub fn prefetch_at<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing that the program can see, and never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

#[cfg(test)]
mod tests {
    use super::letters;

    #[test]
    fn exactly_the_ascii_letters_are_found_at_every_place() {
        for byte in 0..=255u8 {
            for at in 0..16 {
                let mut block = [b'-'; 16];
                block[at] = byte;
                assert_eq!(letters(&block), u32::from(byte.is_ascii_alphabetic()) << at, "{byte:#x} at {at}");
            }
        }
    }
}
