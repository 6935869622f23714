// slot_tokens: y[r] = tokens[places[r].y]
// tokens    [slots]     places [R]: position and slot of each row     y [R]
// dispatch  64 rows a workgroup
struct Params { rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;          // [slots]
@group(0) @binding(2) var<storage, read> places: array<vec2<u32>>;    // [R]
@group(0) @binding(3) var<storage, read_write> y: array<u32>;         // [R]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < p.rows {
        y[id.x] = tokens[places[id.x].y];
    }
}
