//! The linker's output reduced to what the kernel and the loader need, in one order.

use anyhow::{Context as _, Result};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

use crate::btf;

/// The same object without DWARF and relocations of debugging sections, in bytes that depend on the sources alone.
pub(crate) fn canonical(linked: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Builder::read(linked).context("the linker's output is not an ELF object")?;
    for section in &mut elf.sections {
        let name = section.name.as_slice();
        section.delete =
            [&b".debug_"[..], b".rel.debug_", b".rel.BTF"].iter().any(|unneeded| name.starts_with(unneeded));
        if name == b".BTF"
            && let SectionData::Data(content) = &mut section.data
        {
            btf::sort_forward_declarations(content.to_mut()).context("section .BTF")?;
        }
    }
    elf.delete_orphans();
    // LLVM keeps the names of sections and of symbols in one table, which the writer can't.
    let section_names = elf.sections.add();
    section_names.name = b".shstrtab"[..].into();
    section_names.sh_type = SHT_STRTAB;
    section_names.sh_addralign = 1;
    section_names.data = SectionData::SectionString;
    let mut bytes = Vec::new();
    elf.write(&mut bytes).context("the object can't be written")?;
    Ok(bytes)
}
