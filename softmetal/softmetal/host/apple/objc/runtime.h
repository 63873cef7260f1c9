// Functions of the Objective-C runtime. On macOS this is the toolchain's own header; elsewhere those functions of GCC's
// runtime library that an implementation of NSObject needs.
#pragma once

#ifdef __APPLE__
#include_next <objc/runtime.h>
#else

#include <objc/objc.h>

#ifdef __cplusplus
extern "C" {
#endif

Class objc_getClass(const char* name);
Class object_getClass(id object);
id class_createInstance(Class type, size_t extra_bytes);
id object_dispose(id object);
const char* class_getName(Class type);
Class class_getSuperclass(Class type);
BOOL class_respondsToSelector(Class type, SEL selector);
BOOL class_conformsToProtocol(Class type, Protocol* protocol);
const char* sel_getName(SEL selector);

#ifdef __cplusplus
}
#endif

#endif
