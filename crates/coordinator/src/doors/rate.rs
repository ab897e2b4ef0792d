//! How often a caller may call: a bucket of tokens each.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// So many buckets, and those that are full again are forgotten: a new one is as full.
const MANY: usize = 1024;

/// Calls a second that each caller may make on average, with bursts.
#[derive(Debug)]
pub struct Rate {
    per_second: f64,
    burst: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Rate {
    /// So many calls a second, and so many at once.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Self {
        let (per_second, burst) = (f64::from(per_second.max(1)), f64::from(burst.max(1)));
        Self { per_second, burst, buckets: Mutex::default() }
    }

    /// Takes one call from the bucket of `name`.
    ///
    /// # Errors
    /// If it is empty: how long to wait.
    pub fn take(&self, name: &str, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if !buckets.contains_key(name) {
            if buckets.len() >= MANY {
                buckets.retain(|_, bucket| self.level(bucket, now) < self.burst);
            }
            buckets.insert(name.to_owned(), Bucket { level: self.burst, at: now });
        }
        let Some(bucket) = buckets.get_mut(name) else { return Ok(()) };
        (bucket.level, bucket.at) = (self.level(bucket, now), now);
        if bucket.level >= 1.0 {
            bucket.level -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - bucket.level) / self.per_second))
    }

    /// What is in a bucket by now.
    fn level(&self, bucket: &Bucket, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(bucket.at).as_secs_f64();
        (bucket.level + passed * self.per_second).min(self.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let (rate, start) = (Rate::new(10, 5), Instant::now());
        assert_eq!((0..100).filter(|_| rate.take("a", start).is_ok()).count(), 5);
        let wait = rate.take("a", start).unwrap_err();
        assert!(wait > Duration::from_millis(90) && wait <= Duration::from_millis(100), "{wait:?}");
        assert!(rate.take("b", start).is_ok(), "another caller has a bucket of its own");
        let later = start + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| rate.take("a", later).is_ok()).count(), 5);
    }

    #[test]
    fn buckets_that_are_full_again_are_forgotten() {
        let (rate, start) = (Rate::new(10, 5), Instant::now());
        for number in 0..10 * MANY {
            let now = start + Duration::from_millis(number as u64);
            assert!(rate.take(&number.to_string(), now).is_ok());
        }
        assert!(rate.buckets.lock().unwrap().len() <= MANY);
    }
}
