//! Changes to inputs that come out the same each time: to the bytes, and, where an input is JSON, to its shape.

use serde_json::{Map, Value};

/// Most changes at once; more only make noise of it.
const CHANGES_MAX: usize = 4;
/// What is put where something else is expected.
const JUNK: [&str; 14] = [
    "null",
    "true",
    "0",
    "-1",
    "9223372036854775808",
    "1e400",
    "0.5",
    r#""""#,
    r#""\u0000""#,
    "[]",
    "{}",
    "[[]]",
    r#"{"":{}}"#,
    r#""howdah.dev/protect""#,
];

/// Numbers that look random and are the same in every run (xorshift64*).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Starts the row of numbers with this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`; 0 when that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or_default() % end.max(1)
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// One of the inputs, changed in up to four places.
///
/// # Panics
/// If there are no inputs.
#[must_use]
pub fn changed(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = random.pick(inputs).clone();
    for _ in 0..=random.below(CHANGES_MAX) {
        let json = if random.below(3) > 0 { serde_json::from_slice::<Value>(&input).ok() } else { None };
        input = match json {
            Some(mut value) => {
                reshape(&mut value, inputs, random);
                value.to_string().into_bytes()
            }
            None => scramble(input, inputs, random),
        };
    }
    input
}

/// Changes some bytes.
fn scramble(mut input: Vec<u8>, inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let (a, b) = (random.below(input.len() + 1), random.below(input.len() + 1));
    let (from, to) = (a.min(b), a.max(b));
    match random.below(6) {
        0 => input.truncate(from),
        1 => drop(input.drain(from..to)),
        2 => input.insert(from, u8::try_from(random.below(256)).unwrap_or_default()),
        3 if from < input.len() => input[from] ^= 1 << random.below(8),
        4 => {
            let part = input[from..to].to_vec();
            input.splice(from..from, part);
        }
        _ => {
            let other = random.pick(inputs);
            let cut = random.below(other.len() + 1);
            input.truncate(from);
            input.extend_from_slice(&other[cut..]);
        }
    }
    input
}

/// Changes one value somewhere in a document.
fn reshape(document: &mut Value, inputs: &[Vec<u8>], random: &mut Random) {
    let depth = random.below(10);
    let mut value = document;
    for _ in 0..depth {
        let length = match &*value {
            Value::Object(map) => map.len(),
            Value::Array(items) => items.len(),
            _ => 0,
        };
        if length == 0 {
            break;
        }
        let i = random.below(length);
        value = match value {
            Value::Object(map) => match map.values_mut().nth(i) {
                Some(inner) => inner,
                None => return,
            },
            Value::Array(items) => &mut items[i],
            _ => return,
        };
    }
    match (random.below(4), value) {
        (0, Value::Object(map)) if !map.is_empty() => remove(map, random),
        (0, Value::Array(items)) if !items.is_empty() => drop(items.remove(random.below(items.len()))),
        (1, Value::Array(items)) if !items.is_empty() => {
            let again = items[random.below(items.len())].clone();
            items.push(again);
        }
        (2, value) => {
            let other = serde_json::from_slice(random.pick(inputs).as_slice()).unwrap_or_default();
            *value = part(other, random);
        }
        (_, value) => *value = serde_json::from_str(random.pick::<&str>(&JUNK)).unwrap_or_default(),
    }
}

fn remove(map: &mut Map<String, Value>, random: &mut Random) {
    let key = map.keys().nth(random.below(map.len())).cloned().unwrap_or_default();
    map.remove(&key);
}

/// Some value of a document.
fn part(mut document: Value, random: &mut Random) -> Value {
    for _ in 0..random.below(8) {
        document = match document {
            Value::Object(map) if !map.is_empty() => {
                let i = random.below(map.len());
                map.into_iter().nth(i).map_or(Value::Null, |(_, value)| value)
            }
            Value::Array(mut items) if !items.is_empty() => items.remove(random.below(items.len())),
            other => return other,
        };
    }
    document
}
