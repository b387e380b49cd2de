//! The pool's omap, through the `rados` command: ceph-csi keeps its books of volumes there.

use std::time::Duration;

use super::{Ceph, CephError, READ_LIMIT, WRITE_LIMIT, part, tail};

/// The key of the image's immutable id; ceph-csi deletes a volume by it.
pub const IMAGE_ID_KEY: &str = "csi.imageid";

impl Ceph {
    /// A value of an omap object; `None` when there is no such key or object.
    ///
    /// # Errors
    /// See [`CephError`].
    pub async fn journal_value(
        &self,
        pool: &str,
        namespace: &str,
        object: &str,
        key: &str,
    ) -> Result<Option<String>, CephError> {
        let attempt = format!("read {key} of {object} in {pool}");
        let value = self.omap_value(pool, namespace, object, key, &attempt).await?;
        Ok(value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Sets a value of an omap object that exists.
    ///
    /// # Errors
    /// [`CephError::NotFound`] when the object does not exist: writing would make it.
    pub async fn set_journal_value(
        &self,
        pool: &str,
        namespace: &str,
        object: &str,
        key: &str,
        value: &str,
    ) -> Result<(), CephError> {
        let attempt = format!("write {key} of {object} in {pool}");
        if self.omap_value(pool, namespace, object, key, &attempt).await?.is_none() {
            return Err(CephError::NotFound { attempt });
        }
        let arguments = ["setomapval", part(object)?, part(key)?, part(value)?];
        self.rados(pool, namespace, &arguments, WRITE_LIMIT, &attempt).await.map(drop)
    }

    pub(super) async fn omap_value(
        &self,
        pool: &str,
        namespace: &str,
        object: &str,
        key: &str,
        attempt: &str,
    ) -> Result<Option<Vec<u8>>, CephError> {
        // Without a file `rados` prints a hex dump.
        let arguments = ["getomapval", part(object)?, part(key)?, "/dev/stdout"];
        match self.rados(pool, namespace, &arguments, READ_LIMIT, attempt).await {
            Ok(value) => Ok(Some(value)),
            Err(CephError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn rados(
        &self,
        pool: &str,
        namespace: &str,
        arguments: &[&str],
        limit: Duration,
        attempt: &str,
    ) -> Result<Vec<u8>, CephError> {
        let mut all = vec!["--pool", part(pool)?];
        if !namespace.is_empty() {
            all.extend(["--namespace", part(namespace)?]);
        }
        all.extend(arguments);
        let answer = self.runner.run("rados", &all, limit, attempt).await?;
        if answer.exit_code == 0 {
            return Ok(answer.stdout);
        }
        // It reports a missing key on its standard output.
        let said = [answer.stderr, answer.stdout].concat();
        Err(failure(&said, self.runner.id(), attempt))
    }
}

/// `rados` always ends with 1; the errno stands in its words.
fn failure(said: &[u8], id: &str, attempt: &str) -> CephError {
    let detail = tail(said);
    let attempt = attempt.to_owned();
    if detail.contains("No such key:") || detail.contains("(2) No such file or directory") {
        return CephError::NotFound { attempt };
    }
    if detail.contains("(1) Operation not permitted") || detail.contains("(13) Permission denied") {
        return CephError::Denied { attempt, id: id.to_owned(), detail };
    }
    CephError::Other { attempt, detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_rados_become_errors_a_caller_branches_on() {
        let of = |said: &str| failure(said.as_bytes(), "howdah-backup", "read it");
        assert!(of("No such key: p/o/k").is_not_found());
        assert!(of("error getting omap value p/o/k: (2) No such file or directory").is_not_found());
        assert!(matches!(of("error: (1) Operation not permitted"), CephError::Denied { .. }));
        assert_eq!(of("error: (5) Input/output error").to_string(), "read it: error: (5) Input/output error");
    }
}
