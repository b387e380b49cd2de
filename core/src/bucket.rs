//! A token bucket: what limits the rate of something that a flood of requests would otherwise multiply.

use std::time::Duration;

/// Holds up to a number of tokens and gains one every so often. The clock is a parameter: the time since any fixed
/// moment, on a clock that never goes back.
#[derive(Debug)]
pub struct TokenBucket {
    capacity: u32,
    every: Duration,
    tokens: u32,
    /// When the last token was gained.
    gained: Duration,
}

impl TokenBucket {
    /// A full bucket that gains one token `every` so long. An `every` of zero limits nothing.
    #[must_use]
    pub const fn full(capacity: u32, every: Duration) -> Self {
        Self { capacity, every, tokens: capacity, gained: Duration::ZERO }
    }

    /// Takes a token; false when there is none.
    pub fn take(&mut self, now: Duration) -> bool {
        if self.every.is_zero() {
            return true;
        }
        let passed = now.saturating_sub(self.gained);
        let gained = u32::try_from(passed.as_nanos() / self.every.as_nanos()).unwrap_or(u32::MAX);
        if gained >= self.capacity - self.tokens {
            // A bucket that is full gains nothing: the next token counts from now.
            self.tokens = self.capacity;
            self.gained = now;
        } else {
            self.tokens += gained;
            self.gained += self.every * gained;
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_passes_and_then_one_every_so_often() {
        let mut bucket = TokenBucket::full(3, SECOND * 2);
        let taken = |bucket: &mut TokenBucket, at: Duration| (0..10).filter(|_| bucket.take(at)).count();
        assert_eq!(taken(&mut bucket, SECOND), 3);
        assert_eq!(taken(&mut bucket, SECOND * 2), 0);
        assert_eq!(taken(&mut bucket, SECOND * 3), 1);
        assert_eq!(taken(&mut bucket, SECOND * 7), 2);
        assert_eq!(taken(&mut bucket, SECOND * 1_000_000), 3, "no more than it holds");
    }

    #[test]
    fn fractions_are_not_lost_between_two_looks() {
        let mut bucket = TokenBucket::full(1, SECOND);
        assert!(bucket.take(SECOND));
        let half = Duration::from_millis(500);
        assert!(!bucket.take(SECOND + half));
        assert!(bucket.take(SECOND * 2), "half a second and half a second are one");
    }

    #[test]
    fn over_a_long_time_the_rate_holds_however_often_it_is_asked() {
        let mut bucket = TokenBucket::full(5, SECOND * 3);
        let passed = (0..60_000).filter(|i| bucket.take(Duration::from_millis(i * 10))).count();
        assert_eq!(passed, 5 + 599_990 / 3000);
        assert!(TokenBucket::full(0, Duration::ZERO).take(SECOND));
        assert!(!TokenBucket::full(0, SECOND).take(SECOND));
    }
}
