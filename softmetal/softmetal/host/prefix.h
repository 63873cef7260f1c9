// Comes before every source file of the software device's host side (-include), the project's own included.
#pragma once

#ifdef __cplusplus
// Answers for the release of macOS that the software device claims to be; clang for Linux would always say yes.
bool softmetal_available(const char* platform_and_version);
#define __builtin_available(platform, ...) softmetal_available(#platform)
#endif

#ifdef __OBJC__
#import <Foundation/Foundation.h>
// What @"text" is. The compiler lays out {isa, characters, length} in the place of NSObject's fields.
@interface NSConstantString : NSString
@end
#endif
