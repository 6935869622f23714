//! The kernels as DirectX gets them, run where there is no DirectX. naga writes the HLSL, as wgpu lets it; glslang,
//! whose HLSL front end shares nothing with naga, reads it and writes SPIR-V; the device runs that. So what naga wrote
//! is judged by another reader and by its results. What stays unchecked: Microsoft's own compilers, which
//! `tests/hlsl/microsoft.sh` asks, and the driver.
//!
//! `DEMASK_HLSL=FOLDER` switches every device of these tests over, and leaves each kernel's HLSL and a line for it
//! there; `tests/hlsl/run.sh` runs the cases so and makes a table.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use demask_engine::gpu::Translation;
use demask_engine::gpu::source::hash;
use naga::back::hlsl::{BindTarget, Options, ShaderModel, Writer};
use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{Module, ShaderStage};

/// The folder that `DEMASK_HLSL` names, if the tests are to run that way.
pub fn folder() -> Option<PathBuf> {
    std::env::var_os("DEMASK_HLSL").filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// SPIR-V of a kernel by way of HLSL.
pub fn translate(kernel: &Translation<'_>) -> Result<Vec<u32>, String> {
    let (module, info) = parse(kernel)?;
    let text = hlsl(kernel, &module, &info, ShaderModel::V6_2)?;
    let words = spirv(&text);
    if let Some(folder) = folder() {
        keep(&folder, kernel, &module, &info, &text, &words)
            .map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    words
}

/// The HLSL for DXC, for FXC where it has all that the kernel needs, and what came of it.
fn keep(
    folder: &Path,
    kernel: &Translation<'_>,
    module: &Module,
    info: &ModuleInfo,
    text: &str,
    words: &Result<Vec<u32>, String>,
) -> std::io::Result<()> {
    let stem = format!("{}-{:016x}", kernel.name, hash(text));
    fs::write(folder.join(format!("{stem}.6_2.hlsl")), text)?;
    let newer = ["Wave", "Quad", "float16_t", "half"].iter().any(|word| text.contains(word));
    if let (false, Ok(older)) = (newer, hlsl(kernel, module, info, ShaderModel::V5_1)) {
        fs::write(folder.join(format!("{stem}.5_1.hlsl")), older)?;
    }
    let outcome = match words {
        Ok(words) => format!("ok\t{}\t{}", text.len(), 4 * words.len()),
        Err(why) => format!("refused\t{}", why.lines().collect::<Vec<_>>().join("; ")),
    };
    let mut log = OpenOptions::new().append(true).create(true).open(folder.join("log.tsv"))?;
    log.write_all(format!("{}\t{stem}\t{outcome}\n", kernel.name).as_bytes())
}

fn parse(kernel: &Translation<'_>) -> Result<(Module, ModuleInfo), String> {
    let text = kernel.wgsl;
    let module = naga::front::wgsl::parse_str(text).map_err(|e| e.emit_to_string(text))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .map_err(|e| e.emit_to_string(text))?;
    let main = Some((ShaderStage::Compute, "main"));
    let constants = kernel.constants.iter().map(|(name, value)| ((*name).to_owned(), *value));
    let (module, info) = process_overrides(&module, &info, main, &constants.collect())
        .map_err(|e| format!("overrides: {e}"))?;
    Ok((module.into_owned(), info.into_owned()))
}

/// What wgpu would hand to DirectX's compiler, but for register numbers: here they are WGSL's bindings.
fn hlsl(
    kernel: &Translation<'_>,
    module: &Module,
    info: &ModuleInfo,
    shader_model: ShaderModel,
) -> Result<String, String> {
    let options = Options {
        shader_model,
        special_constants_binding: Some(BindTarget { space: 1, ..Default::default() }),
        // Zeros would be one store each; no kernel reads what it has not written, and in use none are asked for.
        zero_initialize_workgroup_memory: false,
        restrict_indexing: kernel.checked,
        force_loop_bounding: kernel.checked,
        ..Default::default()
    };
    let (mut text, pipeline) = (String::new(), Default::default());
    let written = Writer::new(&mut text, &options, &pipeline)
        .write(module, info, None)
        .map_err(|e| format!("naga: {e}"))?;
    match written.entry_point_names.as_slice() {
        [Ok(name)] if name == "main" => Ok(text),
        names => Err(format!("naga names entry points {names:?}")),
    }
}

/// A parameter of `main` in place of the constant buffer by which wgpu tells DirectX the number of workgroups.
const COUNT: &str = "workgroup_count";

fn spirv(text: &str) -> Result<Vec<u32>, String> {
    const VALUE: &str =
        "uint3(_NagaConstants.first_vertex, _NagaConstants.first_instance, _NagaConstants.other)";
    const BUFFER: [&str; 2] = ["struct NagaConstants {", "_NagaConstants: register(b0, space1);"];
    if !text.contains(VALUE) {
        return read_by_glslang(text);
    }
    let unlike = || format!("naga writes its constants otherwise now:\n{text}");
    let (start, rest) = text.split_once(BUFFER[0]).ok_or_else(unlike)?;
    let (_, end) = rest.split_once(BUFFER[1]).ok_or_else(unlike)?;
    let text = format!("{start}{end}").replace(VALUE, COUNT);
    // HLSL has no name for it: the position's name makes an input, which SPIR-V then calls by its own.
    let (start, end) = text.split_once("void main(").ok_or_else(unlike)?;
    let mut words =
        read_by_glslang(&format!("{start}void main(uint3 {COUNT} : SV_GroupID, {end}"))?;
    count_workgroups(&mut words, COUNT);
    Ok(words)
}

/// `T x[2] = (T[2])0;`, which casts zero to an array, as `T x[2] = {(T)0,(T)0};`: glslang does not know the cast.
fn with_lists(line: &str) -> String {
    fn list(element: &str, extents: &[usize]) -> String {
        let Some((n, inner)) = extents.split_first() else { return format!("({element})0") };
        format!("{{{}}}", vec![list(element, inner); *n].join(","))
    }
    let written = line.split_once(" = (").and_then(|(start, rest)| {
        let (element, extents) = rest.strip_suffix("])0;")?.split_once('[')?;
        let sizes = extents.split("][").map(str::parse).collect::<Result<Vec<_>, _>>().ok()?;
        let list = list(element, &sizes);
        Some(format!("{start} = {list};"))
    });
    written.unwrap_or_else(|| line.to_owned())
}

fn read_by_glslang(text: &str) -> Result<Vec<u32>, String> {
    let mut text = text.lines().map(|line| with_lists(line) + "\n").collect::<String>();
    // In embedding_backward glslang 12 makes infinities of `(float4x4)0`.
    for (rows, columns) in (2..=4).flat_map(|rows| (2..=4).map(move |columns| (rows, columns))) {
        let matrix = format!("float{rows}x{columns}");
        let zeros = vec!["0.0"; rows * columns].join(",");
        text = text.replace(&format!("({matrix})0"), &format!("{matrix}({zeros})"));
    }
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (source, target) = (folder.path().join("kernel.hlsl"), folder.path().join("kernel.spv"));
    fs::write(&source, text).map_err(|e| e.to_string())?;
    let mut glslang = Command::new("glslangValidator");
    glslang.args(["-D", "-V", "--target-env", "vulkan1.1", "-S", "comp", "-e", "main"]);
    glslang.args(["--hlsl-offsets", "--hlsl-enable-16bit-types", "-o"]).arg(&target).arg(&source);
    let output = glslang.output().map_err(|e| {
        format!("glslangValidator: {e}; Debian and Ubuntu have it as glslang-tools")
    })?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("ERROR")).collect();
        return Err(format!("glslang: {}", errors.join("; ")));
    }
    let bytes = fs::read(&target).map_err(|e| e.to_string())?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// Makes the input variable `name`, which HLSL could only call the workgroup's position, the number of workgroups.
/// glslang leaves it out where it is read and not used.
fn count_workgroups(words: &mut [u32], name: &str) {
    const NAME: u32 = 5;
    const DECORATE: u32 = 71;
    /// Decoration `BuiltIn`, value `WorkgroupId`.
    const WORKGROUP_ID: [u32; 2] = [11, 26];
    const NUM_WORKGROUPS: u32 = 24;
    const HEADER: usize = 5;
    let (mut at, mut named) = (HEADER, Vec::new());
    while at < words.len() {
        let (length, code) = ((words[at] >> 16) as usize, words[at] & 0xffff);
        let Some([id, operands @ ..]) = words.get_mut(at + 1..at + length.max(1)) else {
            at += length.max(1);
            continue;
        };
        if code == NAME {
            let bytes = operands.iter().flat_map(|word| word.to_le_bytes());
            if bytes.take_while(|b| *b != 0).eq(name.bytes()) {
                named.push(*id);
            }
        } else if code == DECORATE && named.contains(id) && *operands == WORKGROUP_ID {
            operands[1] = NUM_WORKGROUPS;
            return;
        }
        at += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_arrays_become_lists() {
        let cast = "    float4 a[2][1] = (float4[2][1])0;";
        assert_eq!(with_lists(cast), "    float4 a[2][1] = {{(float4)0},{(float4)0}};");
        for other in
            ["    uint n = (uint)0;", "static float4x4 m = (float4x4)0;", "x = (a[1]) + 0;"]
        {
            assert_eq!(with_lists(other), other);
        }
    }

    #[test]
    fn the_named_variable_counts_workgroups() {
        let name = |id: u32, word: &[u8; 4]| [3 << 16 | 5, id, u32::from_le_bytes(*word)];
        let decorate = |id: u32| [4 << 16 | 71, id, 11, 26];
        let body = [&name(7, b"wid\0")[..], &name(8, b"n\0\0\0"), &decorate(7), &decorate(8)];
        let mut words = [&[0; 5][..], &body.concat()].concat();
        count_workgroups(&mut words, "n");
        assert_eq!(words[words.len() - 5..], [26, 4 << 16 | 71, 8, 11, 24]);
        let before = words.clone();
        count_workgroups(&mut words, "m");
        assert_eq!(words, before);
    }
}
