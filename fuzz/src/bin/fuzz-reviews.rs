//! libFuzzer over the bodies of reviews; `make fuzz` runs it.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| howdah_fuzz::review(body));
