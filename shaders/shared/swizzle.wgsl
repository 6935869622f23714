// Which tile a workgroup makes: bands of eight tile rows, column by column, so that neighbours share what they read.
fn swizzle(group: vec2<u32>, grid: vec2<u32>) -> vec2<u32> {
    let linear = group.y * grid.x + group.x;
    let band = linear / (8u * grid.x);
    let rows = min(8u, grid.y - 8u * band);
    let inside = linear - band * 8u * grid.x;
    return vec2<u32>(inside / rows, 8u * band + inside % rows);
}
