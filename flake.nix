{
  description = "MLX-format quantized matrix products for PyTorch";

  inputs = {
    # A revision that reads edition 6 of build.toml, and no other; v0.17.2 reads edition 5.
    kernel-builder.url = "github:huggingface/kernels/c212e38db005a95ef905858bdeca7a3c15b607a4";
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
