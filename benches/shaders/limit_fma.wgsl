// limit_fma: the most multiply-adds a second: three chains of four in registers, no memory until the end
// y         [threads], the sum of the chains; with x = 0.5 and c = 1 each settles at 2, so y = 24
// dispatch  64 threads a workgroup
struct Params { n: u32, x: f32, c: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;   // [threads]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let first = f32(id.x % 64u);
    var a = vec4<f32>(first, first + 1.0, first + 2.0, first + 3.0);
    var b = a + 4.0;
    var d = b + 4.0;
    let x = vec4<f32>(p.x);
    let c = vec4<f32>(p.c);
    // Written as the kernels write it; drivers fuse the two where the hardware can.
    for (var i = 0u; i < p.n; i += 4u) {
        a = a * x + c;
        b = b * x + c;
        d = d * x + c;
        a = a * x + c;
        b = b * x + c;
        d = d * x + c;
        a = a * x + c;
        b = b * x + c;
        d = d * x + c;
        a = a * x + c;
        b = b * x + c;
        d = d * x + c;
    }
    y[id.x] = dot(a + b + d, vec4<f32>(1.0));
}
