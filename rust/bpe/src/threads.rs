//! Work for several threads.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::error::Result;

/// The threads that `None` stands for.
pub fn all_cores() -> usize {
    // Asked once: the answer takes 30 us, as it reads the limits of the control group.
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}

/// Cuts `texts` into `shares` consecutive runs of about equal bytes.
pub fn split_by_bytes<S: AsRef<str>>(texts: &[S], shares: usize) -> Vec<&[S]> {
    let total: usize = texts.iter().map(|t| t.as_ref().len()).sum();
    let mut rest = texts;
    let mut bytes_left = total;
    (0..shares)
        .map(|share| {
            let goal = bytes_left.div_ceil(shares - share);
            let mut taken = 0;
            let count = rest
                .iter()
                .take_while(|t| {
                    let before = taken;
                    taken += t.as_ref().len();
                    before < goal
                })
                .count();
            let count = if share + 1 == shares { rest.len() } else { count };
            let (own, others) = rest.split_at(count);
            bytes_left -= own.iter().map(|t| t.as_ref().len()).sum::<usize>();
            rest = others;
            own
        })
        .collect()
}

/// The results of `work` for `0..count`, in order. Each of `threads` threads calls `work` once, which takes numbers until
/// there are none and gives the results with their numbers.
pub fn in_turn<T: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(&dyn Fn() -> Option<usize>) -> Result<Vec<(usize, T)>> + Sync,
) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < count);
    let mut all = thread::scope(|scope| {
        let jobs: Vec<_> = (1..threads.min(count)).map(|_| scope.spawn(|| work(&take))).collect();
        let mut all = work(&take)?;
        for job in jobs {
            all.extend(job.join().expect("work on texts does not panic")?);
        }
        Ok(all)
    })?;
    all.sort_unstable_by_key(|(i, _)| *i);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}
