//! demask's WGSL as text: each kernel of this folder, and each file of `shared/` that kernels import, by its stem.
//! `README.md` holds the rules they keep. Nothing here knows wgpu; the crate `demask-engine` expands and runs them.

include!(concat!(env!("OUT_DIR"), "/tables.rs"));

/// The text of the kernel `<stem>.wgsl`, before imports are expanded.
///
/// # Panics
/// If there is none; in a constant, at compile time.
pub const fn kernel(stem: &str) -> &'static str {
    let mut i = 0;
    while i < KERNELS.len() {
        let (name, text) = KERNELS[i];
        if same(name.as_bytes(), stem.as_bytes()) {
            return text;
        }
        i += 1;
    }
    panic!("no kernel of this name among the shaders")
}

/// `a == b`, which constants cannot yet ask of slices.
const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_their_whole_name() {
        for (stem, text) in KERNELS {
            assert!(std::ptr::eq(kernel(stem), *text), "{stem}");
            assert!(text.starts_with(&format!("// {stem}: ")), "{stem}");
        }
        assert!(std::panic::catch_unwind(|| kernel("matmu")).is_err());
        assert!(SHARED.iter().any(|(stem, _)| *stem == "philox"));
    }
}
