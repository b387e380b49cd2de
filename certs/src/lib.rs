//! howdah certs.
