//! Y = A · B, both from one hash. B rests as each engine's linear layers have it: [N, K] in demask, PyTorch and
//! BLAS, [K, N] in Burn and meganeura; the values are the same.

use anyhow::{Result, ensure};
use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::ops::{self, Layout};
use demask_engine::tensor::{DType, Tensor};

use crate::race::Results;
use crate::work::{Work, samples, value, values};
use crate::worker::{Job, Prepared, timed};

/// The shapes, M×N×K: what others publish, the layers of a 135 M model in training and decoding, and a wide layer.
pub fn works(quick: bool) -> Vec<Work> {
    let shape = |half: bool| move |[m, n, k]: [usize; 3]| Work::Matmul { m, n, k, half };
    if quick {
        return vec![shape(false)([128, 1536, 576]), shape(true)([4, 1536, 576])];
    }
    let single = [
        [512, 512, 512],
        [1024, 1024, 1024],
        [128, 1536, 576],
        [128, 576, 1536],
        [512, 4096, 1024],
        [4, 1536, 576],
    ];
    let half = [[512, 4096, 1024], [4, 1536, 576]];
    single.map(shape(false)).into_iter().chain(half.map(shape(true))).collect()
}

/// Samples of the product, computed in f64; `None` for other work.
pub fn reference(work: &Work) -> Option<Results> {
    let Work::Matmul { m, n, k, half } = *work else { return None };
    let b = |i| if half { half::f16::from_f32(value(i, 2)).to_f64() } else { value(i, 2).into() };
    let dot = |at: usize| {
        let (row, column) = (at / n, at % n);
        (0..k).map(|i| f64::from(value(row * k + i, 1)) * b(column * k + i)).sum()
    };
    Some(vec![("y".into(), samples(m * n).map(dot).collect())])
}

fn sampled(y: &[f32]) -> Results {
    vec![("y".into(), samples(y.len()).map(|i| y[i].into()).collect())]
}

struct Demask {
    gpu: Gpu,
    a: Tensor,
    b: Tensor,
    y: Option<Tensor>,
}

/// demask's job.
pub fn demask(m: usize, n: usize, k: usize, half: bool) -> Result<Prepared> {
    let gpu = Gpu::open(GpuOptions::default())?;
    let b = values(n * k, 2);
    let b = match half {
        true => {
            let halves: Vec<half::f16> = b.iter().map(|&x| half::f16::from_f32(x)).collect();
            Tensor::from_bytes(&gpu, bytemuck::cast_slice(&halves), [n, k], DType::F16, "b")
        }
        false => Tensor::from_f32(&gpu, &b, [n, k]),
    };
    let a = Tensor::from_f32(&gpu, &values(m * k, 1), [m, k]);
    let device = gpu.adapter().describe();
    Ok(Prepared::Job(device, Box::new(Demask { gpu, a, b, y: None })))
}

impl Job for Demask {
    fn run(&mut self, times: usize) -> Result<f64> {
        timed(|| {
            for _ in 0..times {
                self.y = Some(ops::matmul(&self.a, &self.b, Layout::NT));
            }
            Ok(self.gpu.sync()?)
        })
    }

    fn results(&mut self) -> Result<Results> {
        Ok(sampled(&self.y.as_ref().expect("run first").to_vec()?))
    }
}

type Sgemm = unsafe extern "C" fn(
    i32,
    i32,
    i32,
    i32,
    i32,
    i32,
    f32,
    *const f32,
    i32,
    *const f32,
    i32,
    f32,
    *mut f32,
    i32,
);

struct OpenBlas {
    library: libloading::Library,
    sizes: [usize; 3],
    a: Vec<f32>,
    b: Vec<f32>,
    y: Vec<f32>,
}

/// The processor's own limit, through the system's OpenBLAS.
pub fn openblas(m: usize, n: usize, k: usize) -> Result<Prepared> {
    let names = ["libopenblas.so.0", "libopenblas.so", "libopenblas.dylib", "libopenblas.dll"];
    // SAFETY: loading a BLAS runs no code but its own set-up of threads.
    let Some(library) = names.iter().find_map(|n| unsafe { libloading::Library::new(n) }.ok())
    else {
        return Ok(Prepared::Skip("no OpenBLAS; apt-get install libopenblas0-pthread".into()));
    };
    // SAFETY: the signature is that of OpenBLAS's own header.
    let threads =
        unsafe { library.get::<unsafe extern "C" fn() -> i32>(b"openblas_get_num_threads")?() };
    let (a, b, y) = (values(m * k, 1), values(n * k, 2), vec![0.0; m * n]);
    let device = format!("CPU, {threads} threads");
    Ok(Prepared::Job(device, Box::new(OpenBlas { library, sizes: [m, n, k], a, b, y })))
}

impl Job for OpenBlas {
    fn run(&mut self, times: usize) -> Result<f64> {
        let [m, n, k] = self.sizes.map(|x| x as i32);
        let OpenBlas { library, a, b, y, .. } = self;
        // SAFETY: the signature is that of cblas.h.
        let sgemm = unsafe { library.get::<Sgemm>(b"cblas_sgemm") }?;
        timed(|| {
            for _ in 0..times {
                // SAFETY: row-major (101), A as it is (111): [M, K], B transposed (112): [N, K], Y: [M, N], each
                // of just that many elements.
                unsafe {
                    let (a, b, y) = (a.as_ptr(), b.as_ptr(), y.as_mut_ptr());
                    sgemm(101, 111, 112, m, n, k, 1.0, a, k, b, k, 0.0, y, n);
                }
            }
            Ok(())
        })
    }

    fn results(&mut self) -> Result<Results> {
        ensure!(!self.y.is_empty(), "no product");
        Ok(sampled(&self.y))
    }
}

#[cfg(feature = "burn")]
pub use with_burn::burn;

#[cfg(feature = "burn")]
mod with_burn {
    use burn::tensor::{FloatDType, Tensor, TensorData};

    use super::*;
    use crate::burn_llama::{device, numbers, wait};

    struct Burn {
        a: Tensor<2>,
        b: Tensor<2>,
        y: Option<Tensor<2>>,
    }

    /// Burn's job; halves multiply with halves there.
    pub fn burn(m: usize, n: usize, k: usize, half: bool) -> Result<Prepared> {
        let (device, name) = device()?;
        let b = crate::checkpoint::transposed(&values(n * k, 2), n, k);
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            let tensor = Tensor::<2>::from_data(TensorData::new(values, shape), &device);
            if half { tensor.cast(FloatDType::F16) } else { tensor }
        };
        let (a, b) = (tensor(values(m * k, 1), [m, k]), tensor(b, [k, n]));
        Ok(Prepared::Job(name, Box::new(Burn { a, b, y: None })))
    }

    impl Job for Burn {
        fn run(&mut self, times: usize) -> Result<f64> {
            timed(|| {
                for _ in 0..times {
                    self.y = Some(self.a.clone().matmul(self.b.clone()));
                }
                wait(self.y.clone().expect("just run"))
            })
        }

        fn results(&mut self) -> Result<Results> {
            let y = self.y.clone().expect("run first").cast(FloatDType::F32);
            Ok(sampled(&numbers(y)?))
        }
    }
}

#[cfg(feature = "meganeura")]
pub use with_meganeura::{describe, meganeura, open};

#[cfg(feature = "meganeura")]
mod with_meganeura {
    use std::sync::Arc;

    use ::meganeura::{
        CoopPolicy, GpuOptions, Graph, Session, SessionConfig, build, init_gpu_context_with,
    };

    use super::*;

    struct Meganeura {
        session: Session,
        len: usize,
    }

    /// meganeura's job, its tile sizes tuned.
    pub fn meganeura(m: usize, n: usize, k: usize, half: bool) -> Result<Prepared> {
        let mut graph = Graph::new();
        let a = graph.input("a", &[m, k]);
        let b = match half {
            true => graph.parameter_f16("b", &[k, n]),
            false => graph.parameter("b", &[k, n]),
        };
        let y = graph.matmul(a, b);
        graph.set_outputs(vec![y]);
        let config = SessionConfig { tune: true, ..SessionConfig::inference_from_env() };
        let mut session = open(&graph, config)?;
        session.set_input("a", &values(m * k, 1));
        session.set_parameter("b", &crate::checkpoint::transposed(&values(n * k, 2), n, k));
        Ok(Prepared::Job(describe(&session), Box::new(Meganeura { session, len: m * n })))
    }

    /// Builds a session. Software adapters only imitate cooperative matrices: there it runs without, eight times
    /// as fast.
    pub fn open(graph: &Graph, mut config: SessionConfig<'_>) -> Result<Session> {
        let gpu = init_gpu_context_with(GpuOptions::from_env())
            .map_err(|e| anyhow::anyhow!("meganeura opens no device: {e:?}"))?;
        if gpu.device_information().is_software_emulated {
            config.runtime.coop = CoopPolicy::Disabled;
        }
        config.gpu = Some(Arc::new(gpu));
        Ok(build(graph, config).0)
    }

    /// The device's name and driver.
    pub fn describe(session: &Session) -> String {
        let info = session.device_information();
        format!("{} ({} {})", info.device_name, info.driver_name, info.driver_info)
    }

    impl Job for Meganeura {
        fn run(&mut self, times: usize) -> Result<f64> {
            timed(|| {
                for _ in 0..times {
                    self.session.step();
                }
                self.session.wait();
                Ok(())
            })
        }

        fn results(&mut self) -> Result<Results> {
            Ok(sampled(&self.session.read_output(self.len)))
        }
    }
}
