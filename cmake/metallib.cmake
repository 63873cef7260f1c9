# Compiles the shaders into quantization_mlx.metallib beside _C, with the compiler of Xcode 26. An older macOS does not
# load it and compiles the embedded source instead, as it does without this file.

# Compiled for an earlier release, tensor operations give wrong results; the link has to name the same one.
set(metal xcrun -sdk macosx metal -std=metal4.0 -mmacosx-version-min=26.2)

execute_process(
  COMMAND ${metal} -x metal -E /dev/null
  RESULT_VARIABLE status OUTPUT_QUIET ERROR_VARIABLE reason ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT status EQUAL 0)
  message(FATAL_ERROR
    "QUANTIZATION_MLX_METALLIB=ON needs a Metal compiler that knows language 4.0: Xcode 26, and its component "
    "MetalToolchain (xcodebuild -downloadComponent MetalToolchain). It said: ${reason}")
endif()

# All of metal/ and what CMakeLists.txt lists for the embedded source: headers are shared.
file(GLOB_RECURSE shader_files CONFIGURE_DEPENDS metal/*.metal)
set(objects "")
foreach(shader IN LISTS shader_files)
  cmake_path(GET shader STEM stem)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${stem}.air)
  add_custom_command(
    OUTPUT ${object}
    # Infinity and NaN are values that weights and results may have.
    COMMAND ${metal} -O2 -fno-fast-math -c ${shader} -o ${object}
    DEPENDS ${shaders} csrc/format.h csrc/formats.h csrc/gpu/kernels.h csrc/gpu/launch.h
    VERBATIM)
  list(APPEND objects ${object})
endforeach()

set(metallib ${CMAKE_CURRENT_BINARY_DIR}/quantization_mlx.metallib)
add_custom_command(OUTPUT ${metallib} COMMAND ${metal} ${objects} -o ${metallib} DEPENDS ${objects} VERBATIM)
add_custom_target(metallib ALL DEPENDS ${metallib})
install(FILES ${metallib} DESTINATION quantization_mlx COMPONENT metallib)
