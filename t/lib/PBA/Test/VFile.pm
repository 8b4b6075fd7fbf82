package PBA::Test::VFile;

# pba-vfile with an NBD server of the tests, without a virtual machine. It ends with the object.
#
#   my $file = PBA::Test::VFile->start(socket => $path, device => 'disk', size => $bytes,
#       bitmap => 'bitmap0');     # or kind => 'image', as of an archive
#
# start() dies with the program's error.

use v5.36;

use File::Temp ();
use Socket qw(SHUT_WR);

use parent qw(PBA::Test::ServedFile PVE::BackupAccess::Provider::Store::RawFile);

sub start ($class, %opt) {
    my $dir = File::Temp->newdir('pba-vfile.XXXXXX', TMPDIR => 1);
    my @arguments = (
        "$dir/vfile-0",
        @opt{qw(socket device size)},
        $opt{bitmap} ? (part => $opt{bitmap}) : ($opt{kind} // 'whole')
    );
    my $self = $class->_serve(@arguments);
    $self->{dir} = $dir;
    return $self;
}

# The exit status of the program, as in $?.
sub end ($self) {
    shutdown($self->{socket}, SHUT_WR);
    waitpid(delete($self->{pid}), 0);
    return $?;
}

1;
