# Writes the shaders' source as C++, for builds that compile them at their first use: Metal has no path for headers then,
# so the project's own stand in the place of their #include, each once, with #line markers between them. A .metal file
# ends there before its table of instances: the host appends the one that it asks for.
#
#   cmake -D OUTPUT=shader_source.cpp -P cmake/embed_shaders.cmake
cmake_minimum_required(VERSION 3.26)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH root)

function(count_lines text result)
  string(REGEX REPLACE "[^\n]" "" newlines "${text}")
  string(LENGTH "${newlines}" count)
  set(${result} ${count} PARENT_SCOPE)
endfunction()

# The text of a file with its headers; `seen` is the list of files that are already in the result.
function(flatten path seen result)
  cmake_path(RELATIVE_PATH path BASE_DIRECTORY "${root}" OUTPUT_VARIABLE name)
  cmake_path(GET path PARENT_PATH directory)
  file(READ "${path}" rest)
  string(REGEX REPLACE "// --- Instances.*" "" rest "${rest}")
  string(REGEX REPLACE "(^|\n)#pragma once" "\\1" rest "${rest}")
  set(text "#line 1 \"${name}\"\n")
  set(line 1)
  while(TRUE)
    string(REGEX MATCH "(^|\n)#include \"([^\"\n]+)\"[^\n]*\n" include "${rest}")
    if(include STREQUAL "")
      break()
    endif()
    set(header "${CMAKE_MATCH_2}")
    string(FIND "${rest}" "${include}" position)
    string(LENGTH "${include}" length)
    math(EXPR next "${position} + ${length}")
    string(SUBSTRING "${rest}" 0 ${position} before)
    string(SUBSTRING "${rest}" ${next} -1 rest)
    count_lines("${before}${include}" lines)
    math(EXPR line "${line} + ${lines}")
    string(APPEND text "${before}\n")
    cmake_path(ABSOLUTE_PATH header BASE_DIRECTORY "${directory}" NORMALIZE)
    if(NOT header IN_LIST ${seen})
      list(APPEND ${seen} "${header}")
      flatten("${header}" ${seen} content)
      string(APPEND text "${content}\n")
    endif()
    string(APPEND text "#line ${line} \"${name}\"\n")
  endwhile()
  set(${seen} "${${seen}}" PARENT_SCOPE)
  set(${result} "${text}${rest}" PARENT_SCOPE)
endfunction()

file(GLOB_RECURSE shaders "${root}/metal/*.metal")
list(SORT shaders)
list(LENGTH shaders count)
set(entries "")
foreach(shader IN LISTS shaders)
  set(files "")
  flatten("${shader}" files source)
  cmake_path(GET shader STEM stem)
  string(APPEND entries "    {\"${stem}\", R\"metal(${source})metal\"},\n")
endforeach()
file(
  WRITE "${OUTPUT}"
  "// Written by cmake/embed_shaders.cmake.\n#include \"metal/shader_source.h\"\n\nnamespace quantization_mlx::metal {\n\n"
  "const ShaderSource shader_sources[] = {\n${entries}};\n"
  "const std::size_t shader_source_count = ${count};\n\n}  // namespace quantization_mlx::metal\n")
