// The root class. On macOS this is the toolchain's own header.
#pragma once

#ifdef __APPLE__
#include_next <objc/NSObject.h>
#elif defined(__OBJC__)

#include <objc/objc.h>

@class NSString;

@protocol NSObject
- (BOOL)isEqual:(id)object;
@property(readonly) NSUInteger hash;
- (Class)class;
- (instancetype)self;
- (BOOL)isKindOfClass:(Class)type;
- (BOOL)conformsToProtocol:(Protocol*)protocol;
- (BOOL)respondsToSelector:(SEL)selector;
- (instancetype)retain;
- (oneway void)release;
- (instancetype)autorelease;
- (NSUInteger)retainCount;
@property(readonly, copy) NSString* description;
@end

__attribute__((objc_root_class))
@interface NSObject<NSObject> {
  Class isa;
  // Apple's runtime counts elsewhere. With GCC's runtime the offsets of fields are fixed when a subclass is compiled,
  // so all fields have to be declared where the class is: one for what a class of the frameworks keeps.
  NSUInteger _references;
 @public
  void* _state;
}
+ (void)load;
+ (void)initialize;
- (instancetype)init;
+ (instancetype)new;
+ (instancetype)alloc;
- (void)dealloc;
- (id)copy;
+ (Class)class;
@end

#endif
