//! The part of fuzzing that belongs to every test run: the corpus, and the same changes to it each time.

use howdah_fuzz::mutation::{Random, changed};
use howdah_fuzz::{annotations, corpus, review};

/// Changed inputs per target: a few seconds of an unoptimised build.
const CHANGED: usize = 6000;

/// Shows the input that was being looked at when a property did not hold.
struct Shown<'a>(&'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input: {:?}", String::from_utf8_lossy(self.0));
        }
    }
}

fn run(inputs: &[Vec<u8>], target: fn(&[u8])) {
    for input in inputs {
        let _shown = Shown(input);
        target(input);
    }
    let mut random = Random::new(2018);
    for _ in 0..CHANGED {
        let input = changed(inputs, &mut random);
        let _shown = Shown(&input);
        target(&input);
    }
}

#[test]
fn every_review_gets_an_answer() {
    let mut inputs = corpus::files("reviews");
    inputs.extend(corpus::fixtures());
    let readable = inputs.iter().filter(|input| howdah_webhook::review::decode(input).is_ok());
    assert!(readable.count() > 50, "most of them are reviews");
    run(&inputs, review);
}

#[test]
fn every_annotation_is_read_or_refused() {
    let inputs = corpus::files("annotations");
    assert!(inputs.len() >= 5);
    run(&inputs, annotations);
}
