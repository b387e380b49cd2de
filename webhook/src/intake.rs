//! Takes bodies in, so that the memory of all of them together has a bound, whoever sends them and however slowly.
//!
//! There are two budgets: for the bytes of bodies that arrive, counted as they arrive, so that a body of which little has
//! come holds little; and for what is read from whole bodies, which may be a hundred times their size.

use std::sync::Arc;

use axum::body::{Body, HttpBody as _};
use axum::http::StatusCode;
use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Longest body: a review holds an object of at most 3 MiB twice, old and new, and some more around it.
pub const BODY_BYTES_MAX: usize = 7 * 1024 * 1024;
/// Bytes of bodies at a time, at most: room for nine of the longest, or for thousands of the usual 10 KiB.
const BODIES_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Memory of what is read from bodies at a time, by [`weight`], at most. Two objects of 1.5 MiB, the most that etcd
/// takes, weigh about 60 MiB with their managed fields. With the bodies, the connections and the process itself this
/// stays below the memory limit of the deployment (384 MiB): measured with the worst bodies, 240 to 252 MiB at the peak as
/// it is installed, and up to 370 MiB where the allocator does not give back as early.
const READ_BYTES_MAX: usize = 128 * 1024 * 1024;
/// What more than [`BODY_BYTES_MAX`] is read and thrown away, so that the client reads the refusal instead of a broken
/// connection; beyond that it is cut off.
const DISCARD_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Reserved for a body before the first byte has come.
const FIRST_BYTES_MAX: usize = 64 * 1024;
/// Permits of a semaphore are this many bytes, because their number is 32 bits.
const PERMIT_BYTES: usize = 1024;

/// Up to this length a body is taken at its worst and not looked through: almost every review is shorter.
const UNWEIGHED_BYTES_MAX: usize = 16 * 1024;
/// The worst: a list of objects of one short field each. Measured on serde_json with ordered maps.
const WORST_BYTES_PER_BYTE: usize = 100;
/// An object that is not empty, with its first entries.
const OBJECT_BYTES: usize = 400;
/// A further entry of an object, with its key.
const ENTRY_BYTES: usize = 140;
/// A value in a list or an object, with what a growing list reserves.
const VALUE_BYTES: usize = 144;

/// The two budgets; clones share them.
#[derive(Debug, Clone)]
pub struct Intake {
    arriving: Arc<Semaphore>,
    read: Arc<Semaphore>,
}

/// A whole body, which counts against the budgets until it is dropped.
#[derive(Debug)]
pub struct Taken {
    /// Its bytes.
    pub bytes: Vec<u8>,
    arriving: Vec<OwnedSemaphorePermit>,
    read: OwnedSemaphorePermit,
}

/// Room for what is read from a body, until it is dropped.
#[derive(Debug)]
pub struct Room {
    _read: OwnedSemaphorePermit,
}

/// A body that is not taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// The status of the answer.
    pub status: StatusCode,
    /// What is wrong, as a clause.
    pub problem: String,
}

impl Default for Intake {
    fn default() -> Self {
        let budget = |bytes: usize| Arc::new(Semaphore::new(bytes / PERMIT_BYTES));
        Self { arriving: budget(BODIES_BYTES_MAX), read: budget(READ_BYTES_MAX) }
    }
}

impl Intake {
    /// Reads a whole body; waits while the budgets are used up.
    ///
    /// # Errors
    /// If it is too long, would take too much memory, or ends early.
    pub async fn take(&self, body: Body) -> Result<Taken, Refused> {
        let announced = body.size_hint().lower();
        let first = usize::try_from(announced).unwrap_or(usize::MAX).min(FIRST_BYTES_MAX);
        let mut bytes = Vec::with_capacity(first);
        let mut arriving = Vec::new();
        let mut reserved = 0;
        let mut discarded = 0;
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| Refused {
                status: StatusCode::BAD_REQUEST,
                problem: format!("the body ended early: {error}"),
            })?;
            if discarded > 0 || bytes.len() + chunk.len() > BODY_BYTES_MAX {
                // What was kept of it is of no use any more.
                discarded += bytes.len() + chunk.len();
                (bytes, arriving) = (Vec::new(), Vec::new());
                if discarded > DISCARD_BYTES_MAX {
                    break;
                }
                continue;
            }
            bytes.extend_from_slice(&chunk);
            if bytes.len() > reserved {
                let permits = (bytes.len() - reserved).div_ceil(PERMIT_BYTES);
                reserved += permits * PERMIT_BYTES;
                arriving.push(acquire(&self.arriving, permits).await?);
            }
        }
        if discarded > 0 {
            return Err(Refused {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                problem: format!("the body is longer than {BODY_BYTES_MAX} bytes"),
            });
        }
        let weight = weight(&bytes);
        if weight > READ_BYTES_MAX {
            return Err(Refused {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                problem: format!(
                    "the body holds too many values: reading it would take about {weight} bytes of memory, \
                     and {READ_BYTES_MAX} are the limit"
                ),
            });
        }
        let read = acquire(&self.read, weight.div_ceil(PERMIT_BYTES)).await?;
        Ok(Taken { bytes, arriving, read })
    }
}

impl Taken {
    /// Drops the bytes and keeps the room for what was read from them.
    #[must_use]
    pub fn into_room(self) -> Room {
        let Self { bytes, arriving, read } = self;
        drop((bytes, arriving));
        Room { _read: read }
    }
}

async fn acquire(budget: &Arc<Semaphore>, permits: usize) -> Result<OwnedSemaphorePermit, Refused> {
    let permits = u32::try_from(permits).unwrap_or(u32::MAX);
    // The budgets are never closed.
    Arc::clone(budget)
        .acquire_many_owned(permits)
        .await
        .map_err(|error| Refused { status: StatusCode::SERVICE_UNAVAILABLE, problem: error.to_string() })
}

/// What a JSON text takes in memory once it is read, at most, in bytes; its shape is all that is looked at.
fn weight(text: &[u8]) -> usize {
    if text.len() <= UNWEIGHED_BYTES_MAX {
        return text.len() * WORST_BYTES_PER_BYTE;
    }
    // Texts of strings are copied.
    let mut weight = text.len();
    let mut object_is_new = false;
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => loop {
                match bytes.next() {
                    Some(b'\\') => drop(bytes.next()),
                    Some(b'"') | None => break,
                    Some(_) => {}
                }
            },
            b'{' => object_is_new = true,
            // An empty object takes nothing but its place.
            b'}' => object_is_new = false,
            b':' if object_is_new => {
                object_is_new = false;
                weight += OBJECT_BYTES;
            }
            b':' => weight += ENTRY_BYTES,
            b',' | b'[' => weight += VALUE_BYTES,
            _ => {}
        }
    }
    weight
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Bytes;
    use futures::stream;

    fn chunks(lengths: &[usize]) -> Body {
        let chunks: Vec<_> =
            lengths.iter().map(|length| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; *length]))).collect();
        Body::from_stream(stream::iter(chunks))
    }

    #[tokio::test]
    async fn a_body_is_taken_whole_up_to_its_limit() {
        let intake = Intake::default();
        let taken = intake.take(chunks(&[1, 2, 0, BODY_BYTES_MAX - 3])).await.unwrap();
        assert_eq!(taken.bytes.len(), BODY_BYTES_MAX);
        let refused = intake.take(chunks(&[BODY_BYTES_MAX, 1, 5])).await.unwrap_err();
        assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert!(refused.problem.contains("7340032 bytes"), "{}", refused.problem);
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_cut_off() {
        let chunk = || Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 1024 * 1024]));
        let endless = Body::from_stream(stream::repeat_with(chunk));
        let refused = Intake::default().take(endless).await.unwrap_err();
        assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[tokio::test]
    async fn room_is_given_back() {
        let intake = Intake::default();
        let free = || (intake.arriving.available_permits(), intake.read.available_permits());
        let before = free();
        let taken = intake.take(chunks(&[100, 5000, 70_000])).await.unwrap();
        let (arriving, read) = free();
        assert!(arriving < before.0 && read < before.1);
        let room = taken.into_room();
        assert_eq!(free(), (before.0, read));
        drop(room);
        assert_eq!(free(), before);
        intake.take(chunks(&[BODY_BYTES_MAX, 1])).await.unwrap_err();
        assert_eq!(free(), before);
    }

    #[tokio::test]
    async fn bodies_wait_for_room() {
        let intake = Intake::default();
        let mut held = Vec::new();
        for _ in 0..BODIES_BYTES_MAX / BODY_BYTES_MAX {
            held.push(intake.take(chunks(&[BODY_BYTES_MAX])).await.unwrap());
        }
        let waiting = tokio::spawn({
            let intake = intake.clone();
            async move { intake.take(chunks(&[BODY_BYTES_MAX])).await.map(drop) }
        });
        // A short one finds room beside it only when it comes first; here it has to wait, too.
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        held.pop();
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_text_that_would_grow_too_much_is_refused() {
        let bomb = r#"{"":0},"#.repeat(BODY_BYTES_MAX / 7);
        let refused = Intake::default().take(Body::from(bomb)).await.unwrap_err();
        assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert!(refused.problem.contains("too many values"), "{}", refused.problem);
    }

    #[test]
    fn what_real_objects_are_made_of_weighs_little() {
        let entry = r#""f:terminationGracePeriodSeconds":{},"#;
        let managed = entry.repeat(3 * 1024 * 1024 / entry.len());
        assert!(weight(managed.as_bytes()) < READ_BYTES_MAX / 4);
        let text = format!(r#"{{"data":"{}"}}"#, r#"{\"a\":[1,2,3]}"#.repeat(100_000));
        assert_eq!(weight(text.as_bytes()), text.len() + OBJECT_BYTES);
    }
}
