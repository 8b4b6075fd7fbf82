package PBA::Test::Cpio;

# Writes an initramfs in its archive format. The cpio program is not used, because it needs real files, and only
# root could create the device node among them.

use v5.36;

use Fcntl qw(:mode);

sub new ($class) {
    return bless { inode => 0, data => '' }, $class;
}

sub file ($self, $name, $mode, $content) {
    return $self->_entry($name, S_IFREG | $mode, $content);
}

sub directory ($self, $name) {
    return $self->_entry($name, S_IFDIR | 0755, '');
}

sub device ($self, $name, $major, $minor) {
    return $self->_entry($name, S_IFCHR | 0600, '', $major, $minor);
}

# Returns the complete archive.
sub finish ($self) {
    $self->_entry('TRAILER!!!', 0, '');
    return $self->{data};
}

sub _entry ($self, $name, $mode, $content, $major = 0, $minor = 0) {
    my @header = (
        ++$self->{inode}, $mode, 0, 0, 1, 0, length $content,
        0, 0, $major, $minor, 1 + length $name, 0,
    );
    $self->{data} .= '070701' . join '', map { sprintf '%08x', $_ } @header;
    $self->{data} .= "$name\0";
    $self->_pad;
    $self->{data} .= $content;
    $self->_pad;
    return $self;
}

# Names and contents are padded to a multiple of four bytes.
sub _pad ($self) {
    $self->{data} .= "\0" x (-length($self->{data}) % 4);
    return;
}

1;
