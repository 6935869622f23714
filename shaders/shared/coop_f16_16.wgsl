// Cooperative matrices of 16 x 16, f16 operands and f32 sums: Vulkan on NVIDIA and AMD.
enable f16;
enable wgpu_cooperative_matrix;
alias Part = f16;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sum = coop_mat16x16<f32, C>;
const EDGE: u32 = 16u;
