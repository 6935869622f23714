//! Every WGSL file on disk, without a GPU: expanded, validated with the capabilities of its tier,
//! translated for Vulkan, Metal and DirectX, read by tint where it is installed, and held to the
//! rules of shaders/README.md.
//!
//! The names in `.with(&[("NAME", …)])` are left to run time: the engine takes a name that the text
//! declares as `override` for a pipeline constant and panics, naming the kernel, for any other that
//! is no host constant.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use demask_engine::gpu::source::{expand, shared_names};
use demask_tests::report;
use naga::back::pipeline_constants::process_overrides;
use naga::back::{hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy, Layouter};
use naga::valid::{Capabilities, FunctionInfo, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, Expression, Function, Handle, MathFunction, Module, ScalarKind, ShaderStage,
    StorageAccess, TypeInner,
};

const MAX_LINES: usize = 150;
const MAX_STORAGE_BUFFERS: usize = 8;
const MAX_INVOCATIONS: u32 = 256;
/// The base tier's; a kernel of a higher tier may take twice as much, which all such devices have.
const MAX_WORKGROUP_BYTES: u32 = 16 << 10;
/// What the engine gives the parameters of one dispatch.
const MAX_PARAMS_BYTES: u32 = 256;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Stem and text of each WGSL file of a folder, in order.
fn wgsl_files(folder: &str) -> Vec<(String, String)> {
    let entries = fs::read_dir(root().join(folder)).expect("the folder exists");
    let mut files: Vec<_> = entries
        .map(|e| e.expect("a folder can be listed").path())
        .filter(|p| p.extension().is_some_and(|e| e == "wgsl"))
        .map(|p| {
            let stem = p.file_stem().expect("a file has a name").to_string_lossy().into_owned();
            (stem, fs::read_to_string(&p).expect("WGSL is text"))
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{folder} has no WGSL");
    files
}

fn imports(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|l| l.strip_prefix("#import ")).map(str::trim)
}

/// An import that is no file stands for each shared file `<import>_*`; the host chooses one.
fn stands_for(import: &str, file: &str) -> bool {
    file.strip_prefix(import).is_some_and(|rest| rest.starts_with('_'))
}

/// `const NAME: u32 = 64u; // host 64 128`: the name and the values that the host may set.
fn host_constant(line: &str) -> Option<(&str, Vec<u32>)> {
    let (name, rest) = line.strip_prefix("const ")?.split_once(':')?;
    let (_, values) = rest.split_once("// host")?;
    Some((name, values.split_whitespace().map_while(|v| v.parse().ok()).collect()))
}

/// The WGSL of every choice of imports and of listed host constants, each with its name.
fn expansions(stem: &str, source: &str) -> Vec<(String, String)> {
    let mut chosen = vec![(Vec::new(), Vec::new())];
    for import in imports(source).filter(|i| shared_names().all(|s| s != *i)) {
        let files: Vec<_> = shared_names().filter(|file| stands_for(import, file)).collect();
        assert!(!files.is_empty(), "{stem} imports {import}, which stands for no shared file");
        chosen = product(&chosen, &files, |(imports, _), &file| imports.push((import, file)));
    }
    for (name, values) in source.lines().filter_map(host_constant).filter(|(_, v)| !v.is_empty()) {
        chosen = product(&chosen, &values, |(_, constants), &value| constants.push((name, value)));
    }
    let label = |imports: &[(&str, &str)], constants: &[(&str, u32)]| {
        let imports = imports.iter().map(|(_, file)| format!(" {file}"));
        let constants = constants.iter().map(|(name, value)| format!(" {name}={value}"));
        imports.chain(constants).fold(stem.to_owned(), |label, part| label + &part)
    };
    chosen.iter().map(|(i, c)| (label(i, c), expand(stem, source, i, c))).collect()
}

fn product<A: Clone, B>(all: &[A], options: &[B], add: impl Fn(&mut A, &B)) -> Vec<A> {
    let one = |a: &A, option: &B| {
        let mut a = a.clone();
        add(&mut a, option);
        a
    };
    all.iter().flat_map(|a| options.iter().map(move |o| (a, o))).map(|(a, o)| one(a, o)).collect()
}

fn without_comments(text: &str) -> String {
    text.lines().map(|l| l.split("//").next().unwrap_or(l)).collect::<Vec<_>>().join("\n")
}

fn uses_subgroups(text: &str) -> bool {
    let code = without_comments(text);
    let builtin = |(at, word): (usize, &str)| {
        let next = code[at + word.len()..].chars().next();
        next.is_some_and(|c| c.is_uppercase()) || code[..at].ends_with("@builtin(")
    };
    code.match_indices("subgroup").any(builtin) || code.contains("@builtin(num_subgroups)")
}

/// What a kernel needs beyond WebGPU's defaults.
fn tier(text: &str) -> Capabilities {
    let enables = |extension| text.lines().any(|l| l == format!("enable {extension};"));
    let mut tier = Capabilities::empty();
    tier.set(Capabilities::SUBGROUP, uses_subgroups(text));
    tier.set(Capabilities::SHADER_FLOAT16, enables("f16"));
    tier.set(Capabilities::COOPERATIVE_MATRIX, enables("wgpu_cooperative_matrix"));
    tier
}

/// Parses, validates, and sets the overrides to their defaults. Gives the module before that too.
fn validate(text: &str) -> Result<(Module, Module, ModuleInfo), String> {
    // Packing two f16 in a u32 is part of WGSL without any extension.
    let capabilities = tier(text) | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let module = naga::front::wgsl::parse_str(text).map_err(|e| e.emit_to_string(text))?;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|e| e.emit_to_string(text))?;
    let main = Some((ShaderStage::Compute, "main"));
    let (resolved, info) = process_overrides(&module, &info, main, &Default::default())
        .map_err(|e| format!("overrides: {e}"))?;
    let (resolved, info) = (resolved.into_owned(), info.into_owned());
    Ok((module, resolved, info))
}

#[derive(Clone, Copy, Debug)]
enum Target {
    Spirv(u8, u8),
    Msl(u8, u8),
    Hlsl(hlsl::ShaderModel),
}

const TARGETS: &[Target] = &[
    Target::Spirv(1, 3),
    Target::Spirv(1, 6),
    Target::Msl(2, 4),
    Target::Msl(3, 1),
    Target::Hlsl(hlsl::ShaderModel::V5_1),
    Target::Hlsl(hlsl::ShaderModel::V6_0),
    Target::Hlsl(hlsl::ShaderModel::V6_2),
];

/// Why a kernel cannot run there. No reason holds for the base tier, which thus runs everywhere.
fn impossible(target: Target, text: &str) -> Option<&'static str> {
    use hlsl::ShaderModel::{V6_0, V6_2};
    let needs = |capability| tier(text).contains(capability);
    match target {
        Target::Hlsl(_) if needs(Capabilities::COOPERATIVE_MATRIX) => {
            Some("DirectX has no cooperative matrices")
        }
        Target::Hlsl(model) if needs(Capabilities::SUBGROUP) && model < V6_0 => {
            Some("wave operations came with shader model 6.0")
        }
        Target::Hlsl(model) if needs(Capabilities::SHADER_FLOAT16) && model < V6_2 => {
            Some("16-bit types came with shader model 6.2")
        }
        Target::Msl(..) if text.contains("coop_mat16x16") => Some("Metal's matrices are 8 x 8"),
        _ => None,
    }
}

/// The same options as wgpu's, in its checked and in its unchecked mode.
fn translate(
    target: Target,
    module: &Module,
    info: &ModuleInfo,
    checked: bool,
) -> Result<(), String> {
    let policy = if checked { BoundsCheckPolicy::Restrict } else { BoundsCheckPolicy::Unchecked };
    let bounds_check_policies =
        BoundsCheckPolicies { index: policy, buffer: policy, ..Default::default() };
    let names = match target {
        Target::Spirv(major, minor) => {
            let options = spv::Options {
                lang_version: (major, minor),
                bounds_check_policies,
                force_loop_bounding: checked,
                emit_int_div_checks: checked,
                ..Default::default()
            };
            let words = spv::write_vec(module, info, &options, None).map_err(|e| e.to_string())?;
            vec![if words.is_empty() { Err("nothing was written".into()) } else { Ok(()) }]
        }
        Target::Msl(major, minor) => {
            let options = msl::Options {
                lang_version: (major, minor),
                bounds_check_policies,
                zero_initialize_workgroup_memory: checked,
                force_loop_bounding: checked,
                emit_int_div_checks: checked,
                ..Default::default()
            };
            let (_, written) = msl::write_string(module, info, &options, &Default::default())
                .map_err(|e| e.to_string())?;
            let names = written.entry_point_names.into_iter();
            names.map(|n| n.map(drop).map_err(|e| e.to_string())).collect()
        }
        Target::Hlsl(shader_model) => {
            // The number of workgroups reaches HLSL through this binding.
            let special = hlsl::BindTarget { space: 1, ..Default::default() };
            let options = hlsl::Options {
                shader_model,
                special_constants_binding: Some(special),
                zero_initialize_workgroup_memory: checked,
                restrict_indexing: checked,
                force_loop_bounding: checked,
                ..Default::default()
            };
            let (mut text, pipeline) = (String::new(), Default::default());
            let mut writer = hlsl::Writer::new(&mut text, &options, &pipeline);
            let written = writer.write(module, info, None).map_err(|e| e.to_string())?;
            let names = written.entry_point_names.into_iter();
            names.map(|n| n.map(drop).map_err(|e| e.to_string())).collect()
        }
    };
    names.into_iter().collect()
}

/// naga's writers panic on what they do not know; here that is a fault, with the kernel's name.
fn try_translate(
    target: Target,
    module: &Module,
    info: &ModuleInfo,
    checked: bool,
) -> Result<(), String> {
    let work = AssertUnwindSafe(|| translate(target, module, info, checked));
    catch_unwind(work).unwrap_or_else(|_| Err("naga panicked".into()))
}

/// Everything wrong with a kernel, as told by naga and by the rules on bindings and sizes.
fn faults(label: &str, text: &str) -> Vec<String> {
    let (module, resolved, info) = match validate(text) {
        Ok(valid) => valid,
        Err(e) => return vec![format!("{label}: {e}")],
    };
    let mut faults = binding_faults(&module);
    faults.extend(size_faults(&resolved, tier(text)));
    for &target in TARGETS.iter().filter(|&&target| impossible(target, text).is_none()) {
        for checked in [true, false] {
            if let Err(e) = try_translate(target, &resolved, &info, checked) {
                faults.push(format!("{target:?}, checked {checked}: {e}"));
            }
        }
    }
    faults.into_iter().map(|fault| format!("{label}: {fault}")).collect()
}

fn binding_faults(module: &Module) -> Vec<String> {
    let mut faults = Vec::new();
    let mut bound: Vec<_> = module
        .global_variables
        .iter()
        .filter_map(|(_, v)| v.binding.as_ref().map(|b| ((b.group, b.binding), v)))
        .collect();
    bound.sort_by_key(|(at, _)| *at);
    if bound.iter().enumerate().any(|(i, (at, _))| *at != (0, i as u32)) {
        faults.push("bindings of group 0 do not count up from 0".to_owned());
    }
    let Some(((_, params), buffers)) = bound.split_first() else {
        return vec!["no bindings".to_owned()];
    };
    let ty = &module.types[params.ty];
    let named = (params.name.as_deref(), ty.name.as_deref()) == (Some("p"), Some("Params"));
    match &ty.inner {
        TypeInner::Struct { members, span } if named && params.space == AddressSpace::Uniform => {
            let mut end = 0;
            for member in members {
                if member.offset != end {
                    faults.push(format!("Params has a hole in front of {:?}", member.name));
                }
                end = member.offset + module.types[member.ty].inner.size(module.to_ctx());
            }
            if *span > MAX_PARAMS_BYTES {
                faults.push(format!("Params takes {span} bytes of {MAX_PARAMS_BYTES}"));
            }
        }
        _ => faults.push("binding 0 is not `var<uniform> p: Params`".to_owned()),
    }
    let writes: Vec<bool> = buffers.iter().filter_map(|(_, v)| is_written(v.space)).collect();
    if writes.len() != buffers.len() {
        faults.push("a binding beyond 0 is no storage buffer".to_owned());
    }
    if !writes.is_sorted() {
        faults.push("an input is bound behind an output".to_owned());
    }
    if writes.len() > MAX_STORAGE_BUFFERS {
        faults.push(format!("{} storage buffers of {MAX_STORAGE_BUFFERS}", writes.len()));
    }
    faults
}

/// Who uses what drivers differ in (engine/src/numerics.rs), and why nothing depends on it there: `max`, `min` and
/// `clamp` of floats, which lose NaN or do not; `log` of 0; packing and converting what is out of range. A kernel's
/// `main` is told by the kernel. Of the rest of the table no kernel uses anything.
const DELICATE: &[(&str, &str)] = &[
    ("adamw8", "a moment that is not finite has reached its weight"),
    ("larger", "the same"),
    ("code", "the same"),
    (
        "attention",
        "a score's weight is NaN if the score is not finite, whatever the largest is: see weigh",
    ),
    ("largest", "the same"),
    ("attention_few", "the same"),
    ("attention_subgroup8", "the same"),
    ("weigh", "the same"),
    ("attention_combine", "a piece's sum is NaN by itself; a total is at least 1"),
    ("lse_of", "a total is at least 1, or replaced"),
    ("softmax", "the sum is NaN if an element is not finite"),
    ("cross_entropy_chunk", "the same"),
    ("cross_entropy_loss", "a total is at least 1, or NaN, which is added"),
    ("reduce_max", "what calls it knows of NaN by other means"),
    ("choose", "a flag tells of logits that are not finite, by their bits"),
    ("penalised", "the same"),
    ("below", "the same"),
    ("limit", "the same"),
    ("above", "the same"),
    ("commit", "the same"),
    ("decide", "the same"),
    ("swiglu", "bounds an argument of exp; the gate itself is a factor"),
    ("swiglu_backward", "the same"),
    ("gated", "the same"),
    ("cos_sin", "of an angle that is not finite the other steps make NaN"),
    ("narrow", "what is not finite was taken out by its bits, and is put in again"),
];

/// What of a module's functions [`DELICATE`] must know.
fn delicate(stem: &str, module: &Module, info: &ModuleInfo) -> Vec<String> {
    let is_float = |f: &FunctionInfo, e: Handle<Expression>| {
        f[e].ty.inner_with(&module.types).scalar_kind() == Some(ScalarKind::Float)
    };
    let uses = |function: &Function, f: &FunctionInfo| {
        use MathFunction::{Clamp, Log, Log2, Max, Min, Pack2x16float};
        use MathFunction::{InverseSqrt, Pow, Saturate, Sign, SmoothStep, Step};
        let use_of = |e: &Expression| match *e {
            Expression::Math { fun: Max | Min | Clamp | Log, arg, .. } => is_float(f, arg),
            Expression::Math { fun: Pack2x16float, .. } => true,
            Expression::Math { fun, .. } => {
                assert!(
                    !matches!(fun, Log2 | InverseSqrt | Pow | Saturate | Sign | SmoothStep | Step),
                    "{stem}: {fun:?} is used by no kernel, and differs from driver to driver"
                );
                false
            }
            Expression::As { kind, convert: Some(_), expr } => {
                kind != ScalarKind::Float && is_float(f, expr)
            }
            _ => false,
        };
        function.expressions.iter().any(|(_, e)| use_of(e))
    };
    let name = |function: &Function| function.name.clone().unwrap_or_default();
    let called = module.functions.iter().filter(|(h, f)| uses(f, &info[*h])).map(|(_, f)| name(f));
    let main = uses(&module.entry_points[0].function, info.get_entry_point(0));
    called.chain(main.then(|| stem.to_owned())).collect()
}

fn is_written(space: AddressSpace) -> Option<bool> {
    match space {
        AddressSpace::Storage { access } => Some(access.contains(StorageAccess::STORE)),
        _ => None,
    }
}

fn size_faults(module: &Module, tier: Capabilities) -> Vec<String> {
    let mut faults = Vec::new();
    let [entry] = module.entry_points.as_slice() else {
        return vec!["not exactly one entry point main".to_owned()];
    };
    let invocations = entry.workgroup_size.iter().product::<u32>();
    if invocations > MAX_INVOCATIONS {
        faults.push(format!("{invocations} invocations a workgroup of {MAX_INVOCATIONS}"));
    }
    let mut layouter = Layouter::default();
    layouter.update(module.to_ctx()).expect("a valid module has a layout");
    let workgroup =
        module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::WorkGroup);
    let bytes: u32 = workgroup.map(|(_, v)| layouter[v.ty].size.next_multiple_of(16)).sum();
    let most = if tier.is_empty() { MAX_WORKGROUP_BYTES } else { 2 * MAX_WORKGROUP_BYTES };
    if bytes > most {
        faults.push(format!("{bytes} bytes of workgroup memory of {most}"));
    }
    faults
}

/// What is wrong with the file as a text.
fn text_faults(stem: &str, source: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let header: Vec<&str> = source.lines().map_while(|l| l.strip_prefix("// ")).collect();
    if !header.first().is_some_and(|l| l.starts_with(&format!("{stem}: "))) {
        faults.push(format!("the first line is not `// {stem}: …`"));
    }
    if !header.iter().any(|l| l.starts_with("dispatch ")) {
        faults.push("the header has no line `// dispatch …`".to_owned());
    }
    if source.contains("\nvar<workgroup>") && !header.iter().any(|l| l.starts_with("shared ")) {
        faults.push("the header has no line `// shared …` for the workgroup memory".to_owned());
    }
    // Names stand in front of brackets: `x, y [R, C]    rows [R]`.
    let shaped: Vec<&str> = header
        .iter()
        .skip(1)
        .filter(|l| l.contains('['))
        .flat_map(|l| l.split('[').map(|part| part.rsplit(']').next().unwrap_or(part)))
        .flat_map(|names| names.split([' ', ',']))
        .collect();
    for line in source.lines().filter(|l| l.contains("var<storage")) {
        let name = line.split_once("> ").and_then(|(_, rest)| rest.split_once(':'));
        let name = name.map_or(line, |(name, _)| name);
        if !shaped.contains(&name) || !line.contains("// [") {
            faults.push(format!("no shape of {name}, in the header and behind the binding"));
        }
    }
    let lines = source.lines().count();
    if lines > MAX_LINES {
        faults.push(format!("{lines} lines of {MAX_LINES}"));
    }
    for (name, _) in source.lines().filter_map(host_constant).filter(|(_, v)| v.is_empty()) {
        faults.push(format!("list the values of {name} that the host may set: `// host 64 128`"));
    }
    let named = ["subgroup", "f16", "coop"].iter().any(|word| stem.contains(word));
    if !tier(source).is_empty() && !named {
        faults
            .push("needs more than the base tier; its name must say subgroup, f16 or coop".into());
    }
    faults.into_iter().map(|fault| format!("{stem}: {fault}")).collect()
}

/// A second reader, and the one browsers have: it finds barriers in divergent control flow, which
/// naga lets pass.
fn tint(text: &str) -> io::Result<Result<(), String>> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("kernel.wgsl");
    // naga refuses the directive that tint demands. On the first line, so that line numbers stay.
    let enable = if uses_subgroups(text) { "enable subgroups; " } else { "" };
    fs::write(&file, format!("{enable}{text}"))?;
    let output = Command::new("tint").args(["--format", "wgsl"]).arg(&file).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(if output.status.success() { Ok(()) } else { Err(said) })
}

fn has_tint() -> bool {
    let found = Command::new("tint").arg("--help").output().is_ok();
    if !found {
        println!("SKIPPED: tint is not on PATH");
    }
    found
}

#[test]
fn every_kernel_validates_and_translates() {
    let mut failures = Vec::new();
    let mut skipped = Vec::new();
    let mut n_texts = 0;
    for (stem, source) in wgsl_files("shaders") {
        for (label, text) in expansions(&stem, &source) {
            n_texts += 1;
            failures.extend(faults(&label, &text));
            let reasons = TARGETS.iter().filter_map(|&t| Some((t, impossible(t, &text)?)));
            skipped.extend(reasons.map(|(t, reason)| format!("{label} for {t:?}: {reason}")));
        }
    }
    println!("{n_texts} texts, {} targets; not possible:\n{}", TARGETS.len(), skipped.join("\n"));
    report(failures);
}

#[test]
fn no_kernel_leans_on_what_drivers_differ_in() {
    let mut found = BTreeSet::new();
    for (stem, source) in wgsl_files("shaders").iter().filter(|(stem, _)| stem != "numerics") {
        for (label, text) in expansions(stem, source) {
            let (_, module, info) = validate(&text).unwrap_or_else(|e| panic!("{label}: {e}"));
            found.extend(delicate(stem, &module, &info));
        }
    }
    let known: BTreeSet<String> = DELICATE.iter().map(|(name, _)| (*name).to_owned()).collect();
    let unknown: Vec<_> = found.difference(&known).collect();
    assert!(unknown.is_empty(), "why does nothing depend on what drivers differ in? {unknown:?}");
    let gone: Vec<_> = known.difference(&found).collect();
    assert!(gone.is_empty(), "reasons for nothing: {gone:?}");
}

#[test]
fn every_file_keeps_the_house_rules() {
    let mut failures = Vec::new();
    for (stem, source) in wgsl_files("shaders") {
        failures.extend(text_faults(&stem, &source));
    }
    for (stem, source) in wgsl_files("shaders/shared") {
        if !source.starts_with("// ") || source.lines().count() > MAX_LINES {
            failures.push(format!("shared/{stem}: no comment on top, or over {MAX_LINES} lines"));
        }
    }
    report(failures);
}

#[test]
fn tint_accepts_every_kernel() {
    if !has_tint() {
        return;
    }
    let mut failures = Vec::new();
    for (stem, source) in wgsl_files("shaders") {
        for (label, text) in expansions(&stem, &source) {
            if tier(&text).contains(Capabilities::COOPERATIVE_MATRIX) {
                println!("SKIPPED: {label}: tint does not know wgpu's cooperative matrices");
                continue;
            }
            let read = tint(&text).expect("tint runs");
            failures.extend(read.err().map(|e| format!("{label}: {e}")));
        }
    }
    report(failures);
}

/// All Rust of the workspace but this file.
fn rust_sources(folder: &Path, texts: &mut String) {
    for entry in fs::read_dir(folder).expect("the folder exists") {
        let path = entry.expect("a folder can be listed").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            rust_sources(&path, texts);
        } else if name.ends_with(".rs") && name != "shaders.rs" {
            texts.push_str(&fs::read_to_string(&path).expect("Rust is text"));
        }
    }
}

fn orphans(kernels: &[(String, String)], shared: &[(String, String)], rust: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let imported: Vec<&str> =
        kernels.iter().chain(shared).flat_map(|(_, source)| imports(source)).collect();
    for (stem, _) in shared {
        if !imported.iter().any(|import| import == stem || stands_for(import, stem)) {
            faults.push(format!("shared/{stem} is imported by no kernel"));
        }
    }
    for (stem, _) in kernels {
        let named = [format!("kernel!(\"{stem}\")"), format!("/{stem}.wgsl\"")];
        if !named.iter().any(|name| rust.contains(name)) {
            faults.push(format!("{stem} is declared in no Rust file"));
        }
    }
    faults
}

#[test]
fn no_file_is_an_orphan() {
    let mut rust = String::new();
    rust_sources(&root(), &mut rust);
    report(orphans(&wgsl_files("shaders"), &wgsl_files("shaders/shared"), &rust));
}

/// A kernel without fault, from which each of the following tests takes one thing away.
const GOOD: &str = "\
// good: y[i] = x[i]
// x, y      [n]
// dispatch  one workgroup
// shared    64 values
override WG: u32 = 64u;
struct Params { n: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [n]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [n]
const WIDTH: u32 = 64u; // host 32 64
var<workgroup> kept: array<f32, WIDTH>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) t: u32) {
    kept[t % WIDTH] = x[t];
    workgroupBarrier();
    if t < p.n {
        y[t] = kept[t % WIDTH];
    }
}
";

#[test]
fn each_rule_can_fail() {
    let all = |source: &str| {
        let mut found = text_faults("good", source);
        for (label, text) in expansions("good", source) {
            found.extend(faults(&label, &text));
        }
        found
    };
    assert_eq!(all(GOOD), Vec::<String>::new());
    assert_eq!(expansions("good", GOOD).len(), 2);
    let more: String = (3..10)
        .map(|i| format!("@group(0) @binding({i}) var<storage> b{i}: array<u32>;\n"))
        .collect();
    let nine = format!("{more}const WIDTH");
    let long = format!("{}@compute", "\n".repeat(MAX_LINES));
    let cases: &[(&str, &str, &str)] = &[
        ("x[t]", "z[t]", "no definition in scope"),
        ("x[t]", "1u", "error"),
        ("// good:", "// other:", "first line"),
        ("// dispatch", "// grid", "`// dispatch"),
        ("// shared", "// local", "`// shared"),
        ("// x, y ", "// y ", "no shape of x"),
        ("<f32>;         // [n]", "<f32>;", "no shape of x"),
        ("@compute", &long, "lines of 150"),
        ("const WIDTH", &nine, "9 storage buffers"),
        ("const WIDTH", &nine, "input is bound behind"),
        ("@binding(2)", "@binding(3)", "count up"),
        ("p: Params", "q: Params", "binding 0"),
        ("<uniform> p", "<storage> p", "binding 0"),
        ("n: u32,", "n: u32, v: vec4<f32>,", "hole"),
        ("n: u32,", "n: u32, @size(252) m: u32,", "bytes of 256"),
        ("WG: u32 = 64u", "WG: u32 = 257u", "257 invocations"),
        ("64u; // host 32 64", "64u; // host 32 4097", "bytes of workgroup memory"),
        ("// host 32 64", "// host", "list the values of WIDTH"),
        ("x[t];", "subgroupAdd(x[t]);", "must say subgroup"),
        ("x[t];", "f32(f16(x[t]));", "f16"),
        ("main", "other", "entry point"),
    ];
    for (from, to, message) in cases {
        // Where the name of a binding changes, so do its uses.
        let bad = match *to {
            "q: Params" => GOOD.replace(from, to).replace("p.n", "q.n"),
            _ => GOOD.replacen(from, to, 1),
        };
        assert_ne!(bad, GOOD, "{from} is not in the sample");
        let found = all(&bad);
        assert!(found.iter().any(|f| f.contains(message)), "{to}: no {message} in {found:#?}");
    }
}

#[test]
fn translation_can_fail() {
    let text = "@compute @workgroup_size(1) fn main() { var x = 1.0lf; x += x; }";
    let module = naga::front::wgsl::parse_str(text).expect("f64 parses");
    let mut validator = Validator::new(ValidationFlags::all(), Capabilities::FLOAT64);
    let info = validator.validate(&module).expect("f64 is valid with its capability");
    assert!(try_translate(Target::Msl(3, 1), &module, &info, true).is_err(), "Metal has no f64");
    assert_eq!(try_translate(Target::Spirv(1, 3), &module, &info, true), Ok(()));
    let matrix = "enable wgpu_cooperative_matrix;\nalias A = coop_mat16x16<f16, A>;\n";
    let names = TARGETS.iter().filter(|&&t| impossible(t, matrix).is_none());
    assert!(names.clone().count() == 2 && names.clone().all(|t| matches!(t, Target::Spirv(..))));
}

#[test]
fn orphans_are_found() {
    let file = |stem: &str, text: &str| (stem.to_owned(), text.to_owned());
    let kernels = [file("lost", "#import weight\n"), file("kept", "")];
    let shared = [file("weight_f32", ""), file("grid", ""), file("unused", "#import grid\n")];
    assert_eq!(
        orphans(&kernels, &shared, "kernel!(\"kept\")"),
        ["shared/unused is imported by no kernel", "lost is declared in no Rust file",]
    );
}

#[test]
fn tint_finds_divergent_barriers() {
    if !has_tint() {
        return;
    }
    let good = expand("good", GOOD, &[], &[]);
    assert_eq!(tint(&good).expect("tint runs"), Ok(()));
    let bad = good.replace("workgroupBarrier();", "if x[t] > 0.0 { workgroupBarrier(); }");
    assert!(validate(&bad).is_ok(), "naga finds it too: tint may be needed no more");
    let said = tint(&bad).expect("tint runs").expect_err("a divergent barrier is an error");
    assert!(said.contains("uniform control flow"), "{said}");
    let subgroups = good.replace("x[t];", "subgroupAdd(x[t]);");
    assert_eq!(tint(&subgroups).expect("tint runs"), Ok(()), "the directive is prepended");
}
