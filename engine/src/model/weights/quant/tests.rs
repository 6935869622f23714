//! Blocks by their definitions, and what is held of them on the device.

use super::*;

#[test]
fn blocks_decode_as_ggml_defines_them() {
    let packed: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
    let half = |x: f32| f16::from_f32(x).to_le_bytes();
    let expect = |x: fn(f32) -> f32| -> Vec<f32> {
        (0..16).map(|i| x(i as f32)).chain((0..16).map(|i| x(15.0 - i as f32))).collect()
    };
    let decode = |dtype, bytes: Vec<u8>| {
        let mut out = vec![];
        dequantise(dtype, &bytes, &mut out);
        out
    };
    let q4_0 = [&half(0.5)[..], &packed].concat();
    assert_eq!(decode(StoredType::Q4_0, q4_0), expect(|q| 0.5 * (q - 8.0)));
    let q4_1 = [&half(0.5)[..], &half(-3.0), &packed].concat();
    assert_eq!(decode(StoredType::Q4_1, q4_1), expect(|q| 0.5 * q - 3.0));
    let bytes: Vec<u8> = (0..32).map(|i| (i - 16) as i8 as u8).collect();
    let q8_0 = decode(StoredType::Q8_0, [&half(0.25)[..], &bytes].concat());
    assert_eq!(q8_0, (0..32).map(|i| 0.25 * (i - 16) as f32).collect::<Vec<_>>());
    assert_eq!(decode(StoredType::BF16, vec![0x80, 0x3f, 0, 0xc0]), [1.0, -2.0]);
    assert_eq!(decode(StoredType::F16, half(1.5).to_vec()), [1.5]);
}

#[test]
fn repacked_blocks_keep_their_values() {
    use crate::tensor::{DType, stored};
    let noise: Vec<u8> = (0..2 * 3 * 34).map(|i| (i * 89 + 7) as u8).collect();
    for (dtype, block, to) in [
        (StoredType::Q8_0, 34, DType::Q8),
        (StoredType::Q4_0, 18, DType::Q4),
        (StoredType::Q4_1, 20, DType::Q4),
    ] {
        let mut bytes = noise[..2 * 3 * block].to_vec();
        for b in bytes.chunks_mut(block) {
            // Finite scales.
            let d = f16::from_f32(f32::from(b[5]) / 64.0);
            b[..2].copy_from_slice(&d.to_le_bytes());
            if dtype == StoredType::Q4_1 {
                b[2..4].copy_from_slice(&f16::from_f32(-1.5).to_le_bytes());
            }
        }
        let mut expected = vec![];
        dequantise(dtype, &bytes, &mut expected);
        let rows = repack(dtype, &bytes, 96);
        assert_eq!(stored::decode(&rows, 96, to), expected, "{dtype:?}");
    }
}

/// Normal values of many sizes, and blocks of zeros, constants, halves, equal extremes, and no numbers at all.
fn values(n: usize) -> Vec<f32> {
    let mut random = crate::philox::Philox::new(5, [0; 3]);
    let mut values: Vec<f32> = (0..n / 256)
        .flat_map(|block| {
            let scale = [1e-6, 1e-3, 0.02, 1.0, 300.0, 7e4][block % 6];
            [(); 256].map(|()| scale * random.normal())
        })
        .collect();
    let odd = [0.0, -0.0, 0.5, -0.5, 1.5, -2.5, 7.5, 8.0, -8.0, 1e-30, -1e-42, 1e30, -3e38];
    let odd = [&odd[..], &[f32::INFINITY, f32::NEG_INFINITY, f32::NAN]].concat();
    for (i, x) in values.iter_mut().enumerate().skip(1024).take(4096) {
        match i / 32 % 16 {
            0 => *x = 0.0,
            1 => *x = -0.25,
            2 => *x = (i % 32) as f32 / 2.0 - 8.0,
            3 => *x = if i % 7 == 0 { [-1.0, 1.0][i / 7 % 2] } else { 0.1 },
            4 => *x = odd[i * 5 % 13],
            5 if i % 3 == 0 => *x = odd[i % 16],
            _ => {}
        }
    }
    values
}

#[test]
fn levels_are_rounded_as_round_does() {
    let mut xs: Vec<f32> = (-2100..2100).map(|i| i as f32 / 16.0).collect();
    xs.extend(xs.clone().iter().flat_map(|x| [x.next_up(), x.next_down()]));
    xs.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30, 0.499_999_97, 8_388_609.0]);
    for (least, most) in [(0.0, 15.0), (-127.0, 127.0), (-32.0, 31.0), (0.0, 63.0), (-128.0, 127.0)]
    {
        for &x in &xs {
            let want = x.round().clamp(least, most) as i32;
            assert_eq!(crate::tensor::stored::level(x, least, most), want, "{x}");
        }
    }
}

#[test]
fn blocks_of_four_bits_are_as_their_definition_has_them() {
    let values = values(1 << 14);
    let mut blocks = Vec::new();
    quantise(StoredType::Q4_0, &values, &mut blocks);
    for (block, x) in blocks.as_chunks::<18>().0.iter().zip(values.as_chunks::<32>().0) {
        if x.iter().any(|x| !x.is_finite()) {
            assert!(f16::from_le_bytes([block[0], block[1]]).is_nan(), "{x:?}");
            continue;
        }
        let most = x.iter().fold(0.0f32, |a, x| if x.abs() > a.abs() { *x } else { a });
        let d = f16::from_f32(most / -8.0);
        let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
        let q = x.map(|x| (x * inverse + 8.0).round().clamp(0.0, 15.0) as u8);
        assert_eq!(block[..2], d.to_le_bytes(), "{x:?}");
        for (i, byte) in block[2..].iter().enumerate() {
            assert_eq!(*byte, q[i] | q[i + 16] << 4, "{x:?}");
        }
    }
}

#[test]
fn every_type_is_held_as_closely_as_it_says() {
    use crate::tensor::stored::decode;
    let mut random = crate::philox::Philox::new(9, [0; 3]);
    for dtype in StoredType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        let (elements, bytes) = (dtype.block_elements(), dtype.block_bytes());
        let mut blocks: Vec<u8> =
            (0..12 * bytes).map(|_| (random.uniform() * 256.0) as u8).collect();
        // Scales that are finite, wherever a type has them.
        let scales: &[usize] = match dtype {
            StoredType::Q2_K => &[80, 82],
            StoredType::Q3_K => &[108],
            StoredType::Q6_K => &[208],
            StoredType::MXFP4 => &[],
            StoredType::Q4_1 | StoredType::Q5_1 | StoredType::Q4_K | StoredType::Q5_K => &[0, 2],
            _ => &[0],
        };
        for block in blocks.chunks_mut(bytes) {
            for &at in scales {
                let d = f16::from_f32(0.01 * (random.uniform() - 0.5));
                block[at..at + 2].copy_from_slice(&d.to_le_bytes());
            }
            if dtype == StoredType::MXFP4 {
                block[0] = 104 + block[0] % 40;
            }
        }
        let mut want = Vec::new();
        dequantise(dtype, &blocks, &mut want);
        let columns = 4 * elements;
        let (held, fidelity) = dtype.held_as();
        let got = decode(&repack(dtype, &blocks, columns), columns, held);
        assert_eq!(got.len(), want.len(), "{dtype:?}");
        for (got, want) in got.as_chunks::<32>().0.iter().zip(want.as_chunks::<32>().0) {
            let most = want.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let step = match fidelity {
                Fidelity::Same | Fidelity::Exact => 0.0,
                Fidelity::ScalesRounded => most / 1000.0,
                Fidelity::Rounded => most / 250.0,
            };
            let near = got.iter().zip(want).all(|(a, b)| (a - b).abs() <= step);
            assert!(near, "{dtype:?}: {got:?} instead of {want:?}");
        }
    }
}

#[test]
fn powers_of_two_beyond_a_half_are_rounded_or_infinite() {
    let block = |e: u8| {
        let mut bytes = [0x72; 17];
        bytes[0] = e;
        bytes
    };
    let least = 2f32.powi(-25);
    for (e, bound) in [(0, least), (1, least), (103, least), (104, 0.0), (146, 0.0), (147, 0.0)] {
        let mut want = Vec::new();
        dequantise(StoredType::MXFP4, &block(e), &mut want);
        let rows = repack(StoredType::MXFP4, &block(e), 32);
        let got = crate::tensor::stored::decode(&rows, 32, DType::Q8);
        // 2¹⁹ is beyond what f16 times eight bits can hold, and must not pass for a number.
        assert!(e < 147 || got.iter().any(|x| !x.is_finite()), "{got:?}");
        let near = |(a, b): (&f32, &f32)| e == 147 || (a - b).abs() <= bound;
        assert!(got.iter().zip(&want).all(near), "{e}: {got:?} instead of {want:?}");
    }
}
