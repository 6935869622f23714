//! Measuring kernels so that a change of some per cent is found on a machine that is not quiet: what is timed, on which
//! clock, against which control, how two sets of times are compared, and how the result is written down. The `demask
//! bench` commands and the criterion benches both use this; neither measures by itself.
//!
//! A *sample* is the time of some calls of one case, at least a few milliseconds. Samples of all cases are taken in
//! turn, round by round, each beside a sample of two *controls* (multiply-adds in registers, a copy), so that what
//! slows the machine is seen in the controls too. The *clock* is the device's own where it has timestamps; a software
//! adapter is timed by the processor time of this process, which other programs cannot take away.

pub mod ab;
pub mod compare;
pub mod control;
pub mod decode;
pub mod device;
pub mod export;
pub mod html;
pub mod measure;
pub mod model;
pub mod record;
pub mod run;
pub mod stats;
pub mod suite;
pub mod work;
