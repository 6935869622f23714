// One step of a tiled product through workgroup memory: 128 blocks of 4 k by 4 of a, as many of w, one for each of 256
// invocations. A kernel declares QUADS, the row (and column) quads of its tile; a step has 512 / QUADS k.
const BLOCKS: u32 = 128u / QUADS;             // along k
var<workgroup> tile_a: array<vec4<f32>, 512>;   // [k, row quad]
var<workgroup> tile_w: array<vec4<f32>, 512>;   // [k, column quad]

// Neighbours read along memory.
fn load(t: u32, first: vec2<u32>, k: u32, end: u32, z: u32) {
    let i = t % 128u;
    let q = i / BLOCKS;
    let at = 4u * (i % BLOCKS);
    let to = at * QUADS + q;
    if t < 128u {
        let block = block_a(z, first.y + 4u * q, k + at, end);
        tile_a[to] = block[0];
        tile_a[to + QUADS] = block[1];
        tile_a[to + 2u * QUADS] = block[2];
        tile_a[to + 3u * QUADS] = block[3];
    } else {
        let block = block_w(z, first.x + 4u * q, k + at, end);
        tile_w[to] = block[0];
        tile_w[to + QUADS] = block[1];
        tile_w[to + 2u * QUADS] = block[2];
        tile_w[to + 3u * QUADS] = block[3];
    }
}
