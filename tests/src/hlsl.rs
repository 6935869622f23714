//! The kernels as DirectX gets them, run where there is no DirectX. naga writes the HLSL, as wgpu lets it; glslang, whose
//! HLSL front end shares nothing with naga, reads it and writes SPIR-V; the device runs that. So what naga wrote is
//! judged by another reader and by its results. What stays unchecked: Microsoft's own compilers and the driver.
//!
//! `DEMASK_HLSL=FILE` switches every device of these tests over and appends a line for each kernel that is translated;
//! `tests/hlsl.sh` runs the cases so and makes a table of that file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use demask_engine::gpu::Translation;
use naga::back::hlsl;
use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{Binding, BuiltIn, FunctionArgument, ShaderStage};

/// The file that `DEMASK_HLSL` names, if the tests are to run that way.
pub fn log() -> Option<PathBuf> {
    std::env::var_os("DEMASK_HLSL").filter(|file| !file.is_empty()).map(PathBuf::from)
}

/// SPIR-V of a kernel by way of HLSL.
pub fn translate(kernel: &Translation<'_>) -> Result<Vec<u32>, String> {
    let words = hlsl_of(kernel).and_then(|(text, groups)| {
        let mut words = read_by_glslang(&text)?;
        if let Some(groups) = groups {
            count_workgroups(&mut words, &groups)?;
        }
        Ok((words, text))
    });
    if let Some(path) = log() {
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let outcome = match &words {
            Ok((words, text)) => format!("ok\t{}\t{}", text.len(), 4 * words.len()),
            Err(why) => format!("refused\t{}", why.lines().collect::<Vec<_>>().join("; ")),
        };
        let line = format!("{}\t{:?}\t{outcome}\n", kernel.name, kernel.constants);
        file.and_then(|mut file: File| file.write_all(line.as_bytes()))
            .map_err(|e| format!("{}: {e}", path.display()))?;
    }
    words.map(|(words, _)| words)
}

/// How naga spells the number of workgroups, which DirectX has no name for: wgpu passes it in a constant buffer.
const CONSTANTS: &str =
    "uint3(_NagaConstants.first_vertex, _NagaConstants.first_instance, _NagaConstants.other)";

/// What wgpu would hand to DirectX's compiler, except that the number of workgroups is a parameter of `main`, whose name
/// comes with it.
fn hlsl_of(kernel: &Translation<'_>) -> Result<(String, Option<String>), String> {
    let text = kernel.wgsl;
    let module = naga::front::wgsl::parse_str(text).map_err(|e| e.emit_to_string(text))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .map_err(|e| e.emit_to_string(text))?;
    let main = Some((ShaderStage::Compute, "main"));
    let constants = kernel.constants.iter().map(|(name, value)| ((*name).to_owned(), *value));
    let (module, info) = process_overrides(&module, &info, main, &constants.collect())
        .map_err(|e| format!("overrides: {e}"))?;
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_2,
        special_constants_binding: Some(hlsl::BindTarget { space: 1, ..Default::default() }),
        zero_initialize_workgroup_memory: kernel.checked,
        restrict_indexing: kernel.checked,
        force_loop_bounding: kernel.checked,
        ..Default::default()
    };
    let (mut text, pipeline) = (String::new(), Default::default());
    let written = hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(&module, &info, None)
        .map_err(|e| format!("naga: {e}"))?;
    let [Ok(_)] = written.entry_point_names.as_slice() else {
        return Err(format!("naga: {:?}", written.entry_point_names));
    };
    let is_count = |argument: &&FunctionArgument| {
        argument.binding == Some(Binding::BuiltIn(BuiltIn::NumWorkGroups))
    };
    let arguments = &module.entry_points[0].function.arguments;
    let Some(argument) = arguments.iter().find(is_count) else { return Ok((text, None)) };
    let name = argument.name.clone().ok_or("the number of workgroups has no name")?;
    if !text.contains(&format!("uint3 {name} : SV_GroupID")) {
        return Err(format!("{name} is no parameter of main in naga's HLSL:\n{text}"));
    }
    let text = text.replace(CONSTANTS, &name);
    let (start, rest) = text.split_once("struct NagaConstants {").ok_or("naga's constants")?;
    let (_, end) =
        rest.split_once("_NagaConstants: register(b0, space1);").ok_or("naga's buffer")?;
    let text = format!("{start}{end}");
    if text.contains("_NagaConstants") {
        return Err(format!("another use of naga's constants:\n{text}"));
    }
    Ok((text, Some(name)))
}

/// Makes the input variable `name`, which HLSL could only call the workgroup's position, the number of workgroups.
fn count_workgroups(words: &mut [u32], name: &str) -> Result<(), String> {
    const NAME: u32 = 5;
    const DECORATE: u32 = 71;
    const BUILT_IN: [u32; 2] = [11, 26];
    const NUM_WORKGROUPS: u32 = 24;
    const HEADER: usize = 5;
    let (mut at, mut named) = (HEADER, Vec::new());
    while at < words.len() {
        let (length, code) = ((words[at] >> 16) as usize, words[at] & 0xffff);
        let Some([id, operands @ ..]) = words.get_mut(at + 1..at + length) else {
            return Err("glslang wrote a broken instruction".into());
        };
        if code == NAME {
            let bytes = operands.iter().flat_map(|word| word.to_le_bytes());
            if bytes.take_while(|b| *b != 0).eq(name.bytes()) {
                named.push(*id);
            }
        } else if code == DECORATE && named.contains(id) && *operands == BUILT_IN {
            operands[1] = NUM_WORKGROUPS;
            return Ok(());
        }
        at += length;
    }
    Err(format!("no input variable {name} in glslang's SPIR-V"))
}

fn read_by_glslang(text: &str) -> Result<Vec<u32>, String> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (source, target) = (folder.path().join("kernel.hlsl"), folder.path().join("kernel.spv"));
    std::fs::write(&source, text).map_err(|e| e.to_string())?;
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
    let bytes = std::fs::read(&target).map_err(|e| e.to_string())?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}
