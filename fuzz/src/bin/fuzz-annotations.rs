//! libFuzzer over annotations; `make fuzz` runs it.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &[u8]| howdah_fuzz::annotations(text));
