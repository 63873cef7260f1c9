{
  description = "MLX-format quantized matrix products for PyTorch";

  inputs = {
    # Later builders read edition 6 of build.toml only.
    kernel-builder.url = "github:huggingface/kernels/v0.17.2";
  };

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
      # What the test modules import when they are collected.
      pythonCheckInputs =
        pkgs: with pkgs; [
          hypothesis
          numpy
          transformers
        ];
    };
}
