// Grids fold over y because one dimension holds at most 65535 workgroups: the host sends (x, y, 1) with
// x * y >= n, and the kernel turns back.

fn linear_workgroup(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.x + group.y * groups.x;
}
