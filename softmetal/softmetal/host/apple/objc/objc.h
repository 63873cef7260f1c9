// Basic types of Objective-C. On macOS this is the toolchain's own header; elsewhere these declarations go with clang's
// -fobjc-runtime=gcc and the runtime library of GCC (libobjc.so.4).
#pragma once

#ifdef __APPLE__
#include_next <objc/objc.h>
#else

#include <stdbool.h>
#include <stddef.h>

typedef struct objc_class* Class;
struct objc_object {
  Class isa;
};
typedef struct objc_object* id;
typedef const struct objc_selector* SEL;
typedef id (*IMP)(id, SEL, ...);
#ifdef __OBJC__
@class Protocol;
#endif

// As on Apple silicon, where BOOL is a C bool, and unlike GCC's header, where it is an unsigned char.
typedef bool BOOL;
#define YES __objc_yes
#define NO __objc_no
#define nil nullptr
#define Nil nullptr

typedef long NSInteger;
typedef unsigned long NSUInteger;

#endif
