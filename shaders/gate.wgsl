// gate: live[i] = grids[i] if a word of the flag is not 0, else 0, which skips the dispatches that take their grids here
// flag      [W]
// grids     [n], three words a dispatch
// live      [n]
// dispatch  256 words a workgroup
struct Params { n: u32, word: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> flag: array<u32>;          // [W]
@group(0) @binding(2) var<storage, read> grids: array<u32>;         // [n]
@group(0) @binding(3) var<storage, read_write> live: array<u32>;    // [n]

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < p.n {
        live[id.x] = select(grids[id.x], 0u, flag[p.word] == 0u);
    }
}
