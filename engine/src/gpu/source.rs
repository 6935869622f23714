//! WGSL source expansion. One directive, `#import name` at column 0, pulls `shaders/shared/name.wgsl`
//! in once; a host constant `const NAME: u32 = 64u; // host` may be given another value.
//! There are no conditionals and no text macros: a kernel on disk stays valid WGSL but for its imports.

use demask_shaders::SHARED;

/// The names of the shared files, for the tests that look for orphans.
pub fn shared_names() -> impl Iterator<Item = &'static str> {
    SHARED.iter().map(|(name, _)| *name)
}

/// A hash of all shared files: whatever imports them changes with them.
pub fn shared_hash() -> u64 {
    SHARED.iter().fold(0, |sum, (_, text)| sum ^ hash(text))
}

/// FNV-1a, 64 bits: tells two versions of a text apart, in any build.
pub fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// Expands `source`. `imports` renames an import (`weight` to `weight_bf16`: the way a kernel is made for
/// another storage type); `consts` sets host constants. `enable` lines are hoisted to the top.
///
/// # Panics
/// On an unknown import, and on a constant that the source does not declare as a host constant.
pub fn expand(
    name: &str,
    source: &str,
    imports: &[(&str, &str)],
    consts: &[(&str, u32)],
) -> String {
    let mut enables = String::new();
    let mut body = String::new();
    let mut seen = Vec::new();
    include(name, source, imports, &mut seen, &mut enables, &mut body);
    for (constant, value) in consts {
        let head = format!("const {constant}: u32 = ");
        let start = body
            .find(&head)
            .unwrap_or_else(|| panic!("kernel {name} declares no host constant {constant}"));
        let end = start + body[start..].find(';').expect("a declaration ends with a semicolon");
        body.replace_range(start + head.len()..end, &format!("{value}u"));
    }
    enables + &body
}

fn include(
    name: &str,
    source: &str,
    imports: &[(&str, &str)],
    seen: &mut Vec<String>,
    enables: &mut String,
    body: &mut String,
) {
    for line in source.lines() {
        if let Some(import) = line.strip_prefix("#import ") {
            let import = import.trim();
            let file =
                imports.iter().find(|(from, _)| *from == import).map_or(import, |(_, to)| to);
            if seen.iter().any(|s| s == file) {
                continue;
            }
            seen.push(file.to_owned());
            let (_, text) = SHARED
                .iter()
                .find(|(shared, _)| *shared == file)
                .unwrap_or_else(|| panic!("kernel {name} imports unknown {file}"));
            body.push_str(&format!("// --- shared/{file}\n"));
            include(name, text, imports, seen, enables, body);
            body.push_str(&format!("// --- {name}\n"));
        } else if line.starts_with("enable ") {
            if !enables.contains(line) {
                enables.push_str(line);
                enables.push('\n');
            }
        } else {
            body.push_str(line);
            body.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_once_and_sets_constants() {
        let text = expand(
            "k",
            "#import grid\n#import grid\nconst H: u32 = 64u; // host\nenable f16;\n",
            &[],
            &[("H", 128)],
        );
        assert!(text.starts_with("enable f16;\n"));
        assert_eq!(text.matches("// --- shared/grid").count(), 1);
        assert!(text.contains("const H: u32 = 128u; // host"));
    }

    #[test]
    #[should_panic(expected = "imports unknown nothing")]
    fn unknown_import() {
        expand("k", "#import nothing\n", &[], &[]);
    }

    #[test]
    #[should_panic(expected = "declares no host constant W")]
    fn unknown_constant() {
        expand("k", "const H: u32 = 1u;\n", &[], &[("W", 1)]);
    }
}
