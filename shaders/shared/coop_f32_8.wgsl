// Cooperative matrices of 8 x 8, f32 throughout: Metal.
enable wgpu_cooperative_matrix;
alias Part = f32;
alias Left = coop_mat8x8<f32, A>;
alias Right = coop_mat8x8<f32, B>;
alias Sum = coop_mat8x8<f32, C>;
const EDGE: u32 = 8u;
