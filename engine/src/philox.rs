//! Philox4x32-10, the counter-based generator of Salmon et al. (SC'11): a pure function from (key, counter)
//! to four random words, so that a draw depends on *what* it is for and never on what was drawn before.
//! It is not a cryptographic generator.

/// A stream of draws named by a seed and up to three coordinates (step, sequence, block …).
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    counter: [u32; 4],
    buffer: [u32; 4],
    used: usize,
}

/// One block: four random words for a counter under a key.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = 0xD251_1F53_u64 * u64::from(counter[0]);
        let p1 = 0xCD9E_8D57_u64 * u64::from(counter[2]);
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

impl Philox {
    /// The stream for `seed` at the given coordinates. Distinct coordinates give independent streams.
    pub fn new(seed: u64, coordinates: [u32; 3]) -> Self {
        let [a, b, c] = coordinates;
        Philox {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, a, b, c],
            buffer: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = philox4x32(self.counter, self.key);
            self.counter[0] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform integer in `0..n` (n > 0), by multiply-shift (bias below n / 2³²).
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// Standard normal, Box–Muller.
    pub fn normal(&mut self) -> f32 {
        let u = 1.0 - self.uniform();
        let v = self.uniform();
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the authors' Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
    }

    #[test]
    fn coordinates_name_the_stream() {
        let draw = |c| Philox::new(7, c).next_u32();
        assert_eq!(draw([1, 2, 3]), draw([1, 2, 3]));
        assert_ne!(draw([1, 2, 3]), draw([3, 2, 1]));
    }
}
