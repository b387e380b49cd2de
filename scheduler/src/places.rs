//! How many backups may be under way at once: in the whole cluster, and in one pool of Ceph.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The places there are.
#[derive(Debug)]
pub struct Places {
    cluster: Arc<Semaphore>,
    /// Of each pool.
    in_a_pool: usize,
    /// As many as there are pools that a protected database lies in.
    pools: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// What one backup holds of them; free again when it is dropped.
#[derive(Debug, Default)]
pub struct Place {
    cluster: Option<OwnedSemaphorePermit>,
    pool: Option<OwnedSemaphorePermit>,
}

impl Places {
    /// So many in the whole cluster, and in each pool.
    #[must_use]
    pub fn new(cluster: usize, in_a_pool: usize) -> Self {
        Self { cluster: Arc::new(Semaphore::new(cluster)), in_a_pool, pools: Mutex::default() }
    }

    /// Waits for a place in the cluster.
    pub async fn enter(&self) -> Place {
        Place { cluster: permit(self.cluster.clone()).await, pool: None }
    }

    /// Adds a place in a pool, and says whether it had to be waited for. Meanwhile the place in the cluster is free: a pool
    /// that is busy holds up nobody in another one.
    pub async fn enter_pool(&self, place: &mut Place, pool: &str) -> bool {
        place.pool = None;
        let of_pool = {
            let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
            pools.entry(pool.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(self.in_a_pool))).clone()
        };
        if let Ok(free) = of_pool.clone().try_acquire_owned() {
            place.pool = Some(free);
            return false;
        }
        place.cluster = None;
        place.pool = permit(of_pool).await;
        // Who holds a place in the cluster waits for none in a pool, so this comes to its turn.
        place.cluster = permit(self.cluster.clone()).await;
        true
    }
}

/// `None` only of a semaphore that was closed, and these never are.
async fn permit(of: Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    of.acquire_owned().await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test]
    async fn no_more_are_in_the_cluster_or_in_a_pool_than_there_are_places() {
        let places = Places::new(2, 1);
        let (mut first, mut second) = (places.enter().await, places.enter().await);
        assert!(places.enter().now_or_never().is_none(), "a third in the cluster");
        assert!(!places.enter_pool(&mut first, "a").await);

        // The second wants the same pool, and lets a third pass that wants another.
        let mut waits = Box::pin(places.enter_pool(&mut second, "a"));
        assert!(waits.as_mut().now_or_never().is_none(), "two in a pool of one place");
        let mut third = places.enter().now_or_never().expect("a place in the cluster is free");
        assert!(!places.enter_pool(&mut third, "b").await);

        // The pool alone is not enough.
        drop(first);
        assert_eq!(waits.as_mut().now_or_never(), Some(true), "the pool and the cluster have a place");
        drop(waits);
        assert!(places.enter().now_or_never().is_none());
        drop((second, third));
        assert!(places.enter().now_or_never().is_some());
    }
}
